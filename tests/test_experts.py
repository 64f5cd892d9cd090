"""Mixtures of experts: each is moved, placed and computed by itself, and the tokens are those of transformers."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig

from flexgen_hf import Placement, Policy, StepError, Tier, UnsupportedModelError
from flexgen_hf.architectures import describe
from flexgen_hf.bench import emulated
from flexgen_hf.experts import Mixture, find_mixtures
from flexgen_hf.planning.schedule import Lane, What
from flexgen_hf.weights.format import TensorExtent
from flexgen_hf.weights.stacked import find_stacked
from flexgen_hf.weights.tensors import Unit

from .comparison import (
    BEAMS,
    GREEDY,
    SAMPLING,
    THREE_TIERS,
    as_quantized,
    load_ours,
    load_plain,
    quantized_in,
    ragged,
    same_tokens,
    same_values,
    save_tiny,
)
from .tiny import flexgen_threads

TINY: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": None,
}  # fmt: skip
MIXTRAL: dict[str, Any] = {**TINY, "num_local_experts": 8, "num_experts_per_tok": 2}
SPARSE: dict[str, Any] = {**TINY, "moe_intermediate_size": 24, "num_experts_per_tok": 3}
LATENT: dict[str, Any] = {
    **SPARSE, "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "kv_lora_rank": 16,
    "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}  # fmt: skip

#: what differs in their layers: routers, experts that all tokens use, dense layers, biases and transposed matrices
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": MIXTRAL,
    "qwen2_moe": {**SPARSE, "num_experts": 6, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 2},
    "qwen3_moe": {**SPARSE, "head_dim": 16, "num_experts": 6, "mlp_only_layers": [1]},
    "olmoe": {**TINY, "num_experts": 6, "num_experts_per_tok": 3},
    "glm4_moe": {
        **SPARSE, "head_dim": 16, "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 2, "topk_group": 1,
        "first_k_dense_replace": 1, "partial_rotary_factor": 0.5,
    },
    "deepseek_v2": {**LATENT, "topk_method": "greedy"},
    "deepseek_v3": LATENT,
    "gpt_oss": {**TINY, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
}  # fmt: skip

ON_DISK = Policy.parse("0 0 0 100 0 100", batch_size=2, num_batches=4)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = AutoConfig.for_model(request.param, **FAMILIES[request.param])
    return save_tiny(config, tmp_path_factory.mktemp("family") / "model", std=0.25)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(MixtralConfig(**MIXTRAL), tmp_path_factory.mktemp("mixtral") / "model", std=0.25)


@pytest.fixture(scope="module")
def in_16_bit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral") / "model"
    return save_tiny(MixtralConfig(**MIXTRAL), folder, std=0.25, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def plain(mixtral: Path) -> Any:
    return load_plain(mixtral)


# ------------------------------------------------------------------------------------------------------------- families
def test_every_family_gives_the_tokens_of_transformers(family: Path, device: str) -> None:
    with load_ours(family, ON_DISK, device=device) as ours:
        assert ours._executor._experts.stages
        got = same_tokens(load_plain(family), ours, GREEDY, ragged())
        assert ours.last_run.experts.loaded == ours.last_run.experts.applied > 0
    assert len({tuple(row) for row in got[:, 9:].tolist()}) > 2  # the comparison could have failed


def test_every_family_in_4_bits(family: Path, tmp_path: Path, device: str) -> None:
    compression = {"weights": 4, "group_size": 16}
    with load_ours(family, THREE_TIERS, offload_folder=tmp_path, compression=compression, device=device) as ours:
        (store,) = tmp_path.glob("converted-*")
        formats = quantized_in(store)
        assert any("experts" in name for name in formats)
        same_tokens(as_quantized(load_plain(family), formats), ours, GREEDY, ragged())
        assert ours.last_run.dequantizations["per_stage_and_sweep"] == 1


def test_a_layer_with_other_experts_is_one_stage(tmp_path: Path) -> None:
    """Two modules of experts in a layer, or tensors that are not the interface's: it is loaded as a whole."""
    folder = save_tiny(MixtralConfig(**MIXTRAL), tmp_path / "model", std=0.25)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(MixtralConfig(**MIXTRAL))
    structure = describe(model)
    layers: Any = structure.layers
    layers[0].more = layers[2].mlp.experts
    layers[1].mlp.experts.other = torch.nn.Parameter(torch.empty(8, 2, 2, device="meta"))
    assert find_mixtures(layers, structure.layers_name).keys() == {2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flexgen_hf.loading.find_mixtures", lambda *_: {})
        with load_ours(folder, ON_DISK) as ours:
            same_tokens(load_plain(folder), ours, GREEDY, ragged())
            assert ours.last_run.experts.applied == 0


# ------------------------------------------------------------------------------------------------------------- policies
PLACEMENTS = [
    *(Placement.all_on(tier) for tier in Tier),
    Placement(device=0.3, host=0.3),
    Placement(host=0.5, disk=0.5),
]
POLICIES = st.builds(
    Policy,
    weights=st.sampled_from(PLACEMENTS),
    cache=st.sampled_from(PLACEMENTS),
    hidden=st.sampled_from(PLACEMENTS),
    batch_size=st.integers(1, 4),
    num_batches=st.integers(1, 3),
    overlap=st.booleans(),
    layer_slots=st.integers(1, 3),
)
MODES = [GREEDY, SAMPLING, BEAMS]


@settings(max_examples=24, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(policy=POLICIES, lengths=st.lists(st.integers(1, 9), min_size=1, max_size=7), mode=st.sampled_from(MODES))
def test_any_policy(mixtral: Path, plain: Any, policy: Policy, lengths: list[int], mode: dict[str, Any]) -> None:
    with load_ours(mixtral, policy) as ours:
        same_tokens(plain, ours, mode, ragged(lengths))


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(policy=POLICIES, lengths=st.lists(st.integers(1, 9), min_size=1, max_size=7), mode=st.sampled_from(MODES))
def test_any_policy_on_an_accelerator(
    mixtral: Path, plain: Any, policy: Policy, lengths: list[int], mode: dict[str, Any]
) -> None:
    with load_ours(mixtral, policy, device=emulated.install()) as ours:
        same_tokens(plain, ours, mode, ragged(lengths))


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("percents", ["0 0 100 0 100 0", "0 100 100 0 100 0", "40 30 100 0 100 0"])
def test_16_bit_experts_are_cast_where_they_are_multiplied(in_16_bit: Path, percents: str, batches: int) -> None:
    """As each is used once in a sweep, a copy of it would serve nobody."""
    policy = Policy.parse(percents, batch_size=7 // batches + 1, num_batches=batches)
    with load_ours(in_16_bit, policy, dtype=torch.float32) as ours:
        same_tokens(load_plain(in_16_bit, dtype=torch.float32), ours, GREEDY, ragged())
        slots = [
            buffer for (ring, _), pair in ours._executor.weights._slots.items() if ring == "experts" for buffer in pair
        ]
        on_disk = ours._executor.weights.placement[Tier.DISK] > 0
        assert sum(buffer.nbytes for buffer, _ in slots if buffer.tier is Tier.DEVICE) == 0
        assert sum(buffer.nbytes for buffer, _ in slots) <= on_disk * 3 * (3 * 32 * 48 * 2 + 4 * 4096)
        assert ours.last_run.upcasts["per_stage_and_sweep"] == 1


def test_compute_in_16_bit(in_16_bit: Path, device: str) -> None:
    reference = load_plain(in_16_bit, dtype=torch.bfloat16)
    with load_ours(in_16_bit, ON_DISK, dtype=torch.bfloat16, device=device) as ours, torch.no_grad():
        inputs = {name: value.to(ours.device) for name, value in ragged().items()}
        want, got = reference(**ragged()).logits.float(), ours(**inputs).logits.float().cpu()
        real = ragged()["attention_mask"].bool()
        assert (want - got)[real].abs().max() < 0.05 * want.abs().max()


def test_what_is_taken_is_what_is_predicted(in_16_bit: Path) -> None:
    """Of each tier, slots and homes of experts included."""
    for policy in (ON_DISK, THREE_TIERS, ON_DISK.replace(num_batches=1, layer_slots=1)):
        with load_ours(in_16_bit, policy, dtype=torch.float32) as ours:
            ours.generate(**ragged(), **GREEDY, max_new_tokens=3, min_new_tokens=3, pad_token_id=1)
            executor = ours._executor
            needs = executor.weights.needs
            for tier, what in {(need.tier, need.what) for need in needs}:
                wanted = sum(need.nbytes for need in needs if (need.tier, need.what) == (tier, what))
                assert executor.space.ledger.held_as(tier, what) == wanted


def test_more_tokens_than_a_micro_batch_has_go_in_parts(
    mixtral: Path, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexgen_hf.experts.ROWS_AT_ONCE", 1)
    products: list[int] = []
    apply = Mixture.apply

    def noted(mixture: Mixture, expert: int, x: torch.Tensor, multiply: Any) -> torch.Tensor:
        products.append(len(x))
        return apply(mixture, expert, x, multiply)

    monkeypatch.setattr(Mixture, "apply", noted)
    with load_ours(mixtral, Policy.parse("0 0 100 0 100 0", batch_size=1, num_batches=6)) as ours, torch.no_grad():
        same_values(plain(**ragged([12] * 6)).logits, ours(**ragged([12] * 6)).logits)
    assert max(products) == 12  # the tokens of a micro-batch
    assert sum(products) == 6 * 12 * 2 * 3
    assert len(products) > 3 * 8  # some experts had more


# ------------------------------------------------------------------------------------------------------ what is loaded
WIDE = {**MIXTRAL, "hidden_size": 64, "intermediate_size": 128}  # no two experts so near that one read serves both


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(MixtralConfig(**WIDE), tmp_path_factory.mktemp("wide") / "model", std=0.25)


def choices(model: Any, prompts: dict[str, Any], tokens: int) -> list[list[set[int]]]:
    """For each forward of transformers' own generation, and each layer, the experts that its router chose."""
    seen: list[list[set[int]]] = []

    def note(layer: int, logits: torch.Tensor) -> None:
        if layer == 0:
            seen.append([])
        chosen = logits.softmax(-1).topk(2, dim=-1).indices
        seen[-1].append(set(chosen.flatten().tolist()))

    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _m, _a, out, layer=number: note(layer, out[0]))
        for number, layer in enumerate(model.model.layers)
    ]
    model.generate(**prompts, **GREEDY, max_new_tokens=tokens, pad_token_id=1)
    for hook in hooks:
        hook.remove()
    return seen


def apart_from_experts(model: Any) -> int:
    """Bytes that every sweep reads."""
    return sum(t.stored_bytes for t in model._executor.weights.stored if "experts" not in t.name and _moves(t.name))


def _moves(name: str) -> bool:
    return name != "model.norm.weight"


EXPERT_BYTES = 3 * 64 * 128 * 4


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("overlap", [True, False])
def test_a_sweep_reads_the_chosen_experts_once_and_no_others(wide: Path, rows: int, overlap: bool) -> None:
    prompts = ragged([4] * rows)
    expected = choices(load_plain(wide), prompts, tokens=5)
    policy = Policy.parse("0 0 100 0 100 0", batch_size=max(1, rows // 4), num_batches=4, overlap=overlap)
    with load_ours(wide, policy) as ours:
        ours.generate(**prompts, **GREEDY, max_new_tokens=5, pad_token_id=1)
        report, rest = ours.last_run, apart_from_experts(ours)
    counts = [sum(map(len, layers)) for layers in expected]
    assert [sweep.experts.applied for sweep in report.sweeps] == counts
    assert [sweep.experts.loaded for sweep in report.sweeps] == counts
    assert [sweep.experts.read_bytes for sweep in report.sweeps] == [count * EXPERT_BYTES for count in counts]
    assert report.lanes["disk_to_host"].bytes == sum(counts) * EXPERT_BYTES + len(counts) * rest
    if not overlap:  # with it, a sweep loads ahead for the next one
        read = [sweep.lanes["disk_to_host"].bytes for sweep in report.sweeps]
        assert read == [count * EXPERT_BYTES + rest for count in counts]
    assert min(counts) < 3 * 8 or rows == 8  # some experts were left out
    assert report.to_dict()["experts"]["applied"] == sum(counts)
    assert f"{sum(counts)} applied" in str(report)


def test_experts_that_live_in_memory_are_not_loaded(wide: Path) -> None:
    with load_ours(wide, Policy.parse("100 0 100 0 100 0", batch_size=4)) as ours:
        ours.generate(**ragged([4, 4]), **GREEDY, max_new_tokens=3, pad_token_id=1)
        assert ours.last_run.experts.applied > ours.last_run.experts.loaded == 0


def test_shares_are_met_with_experts_as_parts(wide: Path) -> None:
    """A layer's experts are most of it: as one tensor, they could only be on one tier together."""
    with load_ours(wide, Policy.parse("25 25 100 0 100 0", batch_size=2)) as ours:
        placed, units = ours._executor.weights.placement, ours._executor.weights.units
        total = sum(placed.values())
    for tier, share in ((Tier.DEVICE, 0.25), (Tier.HOST, 0.25), (Tier.DISK, 0.5)):
        assert placed[tier] / total == pytest.approx(share, abs=0.02)
    assert {unit.expert for unit in units.values() if unit.stage == 1} == {-1, *range(8)}


def test_an_expert_is_computed_once_for_all_micro_batches(wide: Path) -> None:
    steps: list[Any] = []
    with load_ours(wide, Policy.parse("0 0 100 0 100 0", batch_size=2, num_batches=4)) as ours:
        ours._executor.before_step = lambda _lane, step: steps.append(step)
        ours(**ragged([5] * 8), use_cache=False)
    computed = [s for s in steps if s.what is What.EXPERT and s.lane is Lane.COMPUTE]
    assert len(computed) == len(set(computed)) <= 3 * 8
    for stage in (1, 2, 3):
        order = [s.what for s in steps if s.stage == stage and s.lane is Lane.COMPUTE]
        assert [what for what, _ in itertools.groupby(order)] == [What.STAGE, What.EXPERT, What.REST]


# ------------------------------------------------------------------------------------------------------ what goes wrong
@pytest.mark.parametrize("lane", [Lane.DISK_TO_HOST, Lane.HOST_TO_DEVICE])
def test_a_failure_amid_experts_leaves_the_model_usable(mixtral: Path, plain: Any, lane: Lane) -> None:
    """On a device apart from the host, where experts cross both links."""
    before = set(flexgen_threads())
    with load_ours(mixtral, ON_DISK, device=emulated.install()) as ours:
        failed = False

        def broken(at: str, step: Any) -> None:
            nonlocal failed
            if at == lane and step.what is What.EXPERT and step.stage == 2 and not failed:
                failed = True
                raise OSError("the disk is gone")

        ours._executor.before_step = broken
        inputs = {name: value.to(ours.device) for name, value in ragged().items()}
        with pytest.raises(StepError, match=r"expert \d of stage 2, piece 0"):
            ours.generate(**inputs, **GREEDY, max_new_tokens=4, pad_token_id=1)
        ours._executor.before_step = None
        same_tokens(plain, ours, GREEDY, ragged())
    assert set(flexgen_threads()) <= before


def test_an_error_of_an_expert_itself_keeps_its_type(mixtral: Path, plain: Any) -> None:
    with load_ours(mixtral, ON_DISK) as ours:
        module = ours.model.layers[1].mlp.experts
        module._apply_gate = lambda _: 1 / 0
        with pytest.raises(ZeroDivisionError):
            ours.generate(**ragged(), **GREEDY, max_new_tokens=4, pad_token_id=1)
        del module._apply_gate
        same_tokens(plain, ours, GREEDY, ragged())


def test_experts_that_are_called_twice_are_refused(mixtral: Path) -> None:
    with load_ours(mixtral, ON_DISK) as ours:
        block = ours.model.layers[1].mlp
        plain_forward = block.forward
        block.forward = lambda states: plain_forward(states) + plain_forward(states)
        with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.experts is called twice"):
            ours.generate(**ragged(), **GREEDY, max_new_tokens=2, pad_token_id=1)


def test_experts_outside_of_forward_are_refused(mixtral: Path) -> None:
    with load_ours(mixtral, ON_DISK) as ours:
        index, weights = torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2)
        with pytest.raises(UnsupportedModelError, match="mixture of experts was called outside"):
            ours.model.layers[0].mlp.experts(torch.ones(1, 32), index, weights)


def test_a_layer_that_does_without_its_experts_goes_on(mixtral: Path, plain: Any) -> None:
    """Whether a layer calls them is the model's own business."""
    other: Sequence[Any] = [plain.model.layers[1].mlp]
    with load_ours(mixtral, ON_DISK) as ours:
        other = [*other, ours.model.layers[1].mlp]
        try:
            for block in other:
                block.forward = lambda states: states * 2
            same_tokens(plain, ours, GREEDY, ragged())
        finally:
            for block in other:
                del block.forward


# ---------------------------------------------------------------------------------------------------------- checkpoints
def test_fused_and_separate_experts_give_the_same(mixtral: Path, plain: Any, tmp_path: Path) -> None:
    """A store holds them fused, `save_pretrained` writes them apart as the families' own checkpoints do."""
    from safetensors.torch import load_file

    keys = load_file(mixtral / "model.safetensors").keys()
    assert any(".experts.0.w1.weight" in key for key in keys)
    with load_ours(mixtral, ON_DISK) as ours:
        ours.save_pretrained(tmp_path / "store")
        want = same_tokens(plain, ours, GREEDY, ragged())
    with load_ours(tmp_path / "store", ON_DISK) as ours:
        assert torch.equal(same_tokens(plain, ours, GREEDY, ragged()), want)
        (fused,) = (t for t in ours._executor.weights.stored if t.name == "model.layers.0.mlp.experts.gate_up_proj")
        assert len(fused.parts) == 1
        assert {Unit(1, expert) for expert in range(8)} <= set(ours._executor.weights.units.values())


def sources(shape: tuple[int, ...] = (5, 7)) -> dict[str, TensorExtent]:
    size = 2 * shape[0] * shape[1]
    return {f"{expert}.{part}": TensorExtent(Path("file"), size * (2 * expert + at), size, "F16", shape)
            for expert in range(3) for at, part in enumerate(("gate", "up"))}  # fmt: skip


def stacked(trial: Mapping[str, torch.Tensor], *, order: Sequence[str] = ("gate", "up")) -> torch.Tensor:
    return torch.stack([torch.cat([trial[f"{expert}.{part}"] for part in order]) for expert in (0, 1, 2)])


@pytest.mark.parametrize("order", [("gate", "up"), ("up", "gate")])
def test_what_a_conversion_stacks_is_found_by_trying(order: Sequence[str]) -> None:
    lying = sources()
    found = find_stacked(lying, functools.partial(stacked, order=order))
    assert found is not None
    assert found.shape == (3, 10, 7)
    assert found.matrices == tuple(tuple(lying[f"{expert}.{part}"] for part in order) for expert in (0, 1, 2))


@pytest.mark.parametrize(
    "convert",
    [
        lambda trial: stacked(trial).transpose(1, 2),
        lambda trial: stacked({name: value.t().reshape(2, 3) for name, value in trial.items()}),
        lambda trial: stacked(trial)[:, [0, 2, 1, 3]],
        lambda trial: stacked(trial) * 2,
        lambda trial: stacked(trial)[:2],
        lambda trial: stacked(trial, order=("gate", "gate")),
        lambda trial: stacked(trial)[0],
        lambda trial: 1 / 0,
    ],
    ids=["transposed", "each transposed", "interleaved", "scaled", "one lost", "one twice", "no stack", "refused"],
)
def test_what_a_conversion_does_besides_is_noticed(convert: Any) -> None:
    assert find_stacked(sources(), convert) is None


def test_matrices_that_differ_are_no_stack() -> None:
    other = {**sources(), "2.up": TensorExtent(Path("file"), 0, 70, "BF16", (5, 7))}
    assert find_stacked(other, stacked) is None
    unequal = {**sources(), "2.up": TensorExtent(Path("file"), 0, 84, "F16", (6, 7))}
    assert find_stacked(unequal, stacked) is None
