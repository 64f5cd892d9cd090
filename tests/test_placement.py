"""Which tensor goes where: the shares that a policy asks for are the shares that come out."""

import itertools
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_hf import Placement, Tier
from flexgen_hf.planning.placement import assign, realised

Sizes = Sequence[tuple[str, int]]
Rule = Callable[[Sizes, Placement], dict[str, Tier]]

# the weights' shares of the published policies, device and host in percent
PUBLISHED = [(20, 80), (10, 90), (4, 96), (0, 50)]


def opt_tensors(layers: int, hidden: int, vocabulary: int = 50272) -> list[tuple[str, int]]:
    """Names and bytes of an OPT in 16 bit, in the order in which the original builds them: (module, tensor)."""
    ffn = 4 * hidden
    attention = [(f"{kind}.{n}", s) for kind in ("q", "k", "v", "out") for n, s in (("w", hidden**2), ("b", hidden))]
    mlp = [("fc1.w", hidden * ffn), ("fc1.b", ffn), ("fc2.w", hidden * ffn), ("fc2.b", hidden)]
    norm = [("norm.w", hidden), ("norm.b", hidden)]
    modules = {"embedding": [("tokens", vocabulary * hidden), ("positions", 2050 * hidden)]}
    for layer in range(layers):
        modules[f"{layer:02}.attention"] = [*attention, *norm]
        modules[f"{layer:02}.mlp"] = [*mlp, *norm]
    modules["head"] = [*norm, ("tokens", vocabulary * hidden)]
    return [(f"{module}/{name}", 2 * size) for module, tensors in modules.items() for name, size in tensors]


SHAPES = {
    "opt-1.3b": opt_tensors(24, 2048),
    "opt-30b": opt_tensors(48, 7168),
    "opt-175b": opt_tensors(96, 12288),
}


def originals_rule(sizes: Sizes, placement: Placement) -> dict[str, Tier]:
    """FlexGen's `init_weight_list`: in each module on its own, the tier in whose share a tensor's middle falls."""
    homes = {}
    for _, group in itertools.groupby(sizes, key=lambda item: item[0].partition("/")[0]):
        module = list(group)
        total, before = sum(size for _, size in module), 0
        for key, size in module:
            middle = (before + size / 2) / total
            before += size
            if middle < placement.share(Tier.DISK):
                homes[key] = Tier.DISK
            elif middle < placement.share(Tier.DISK) + placement.share(Tier.HOST):
                homes[key] = Tier.HOST
            else:
                homes[key] = Tier.DEVICE
    return homes


def assert_shares_are_honoured(rule: Rule, sizes: Sizes, placement: Placement) -> None:
    got, total = realised(sizes, rule(sizes, placement)), sum(size for _, size in sizes)
    for tier in Tier:
        assert got[tier] / total == pytest.approx(placement.share(tier), abs=0.02), f"{tier}"


@pytest.mark.parametrize("percents", PUBLISHED)
@pytest.mark.parametrize("shape", SHAPES)
def test_defect_2_weight_percentages_are_honoured(shape, percents):
    placement = Placement(device=percents[0] / 100, host=percents[1] / 100)
    assert_shares_are_honoured(assign, SHAPES[shape], placement)


@pytest.mark.parametrize("percents", PUBLISHED[:2])
def test_defect_2_put_back_is_noticed(percents):
    placement = Placement(device=percents[0] / 100, host=percents[1] / 100)
    with pytest.raises(AssertionError):
        assert_shares_are_honoured(originals_rule, SHAPES["opt-30b"], placement)


def test_the_originals_rule_is_the_originals():
    sizes = SHAPES["opt-30b"]
    total = sum(size for _, size in sizes)
    shares = [
        realised(sizes, originals_rule(sizes, Placement(device=device, host=1 - device)))[Tier.DEVICE] / total
        for device in (0.2, 0.1)
    ]
    assert [f"{share:.1%}" for share in shares] == ["8.2%", "0.1%"]  # as measured with the original


class TestAssign:
    SIZES = st.lists(st.integers(1, 10_000), min_size=1, max_size=60).map(lambda sizes: list(enumerate(sizes)))

    @given(SIZES, st.integers(0, 100), st.integers(0, 100))
    @settings(max_examples=200, deadline=None)
    def test_as_near_as_the_largest_tensor_allows(self, sizes, device, host):
        host = min(host, 100 - device)
        placement = Placement(device=device / 100, host=host / 100)
        homes = assign(sizes, placement)
        got, total = realised(sizes, homes), sum(size for _, size in sizes)
        for tier in Tier:
            assert abs(got[tier] - placement.share(tier) * total) <= max(size for _, size in sizes)
            if placement.share(tier) == 0:
                assert got[tier] == 0
        assert set(homes) == {key for key, _ in sizes}

    def test_what_is_fixed_stays_and_counts(self):
        sizes = [("norms", 200), *((f"matrix{i}", 100) for i in range(8))]
        homes = assign(sizes, Placement(device=0.4, host=0.6), {"norms": Tier.DEVICE})
        assert homes["norms"] is Tier.DEVICE
        assert realised(sizes, homes) == {Tier.DEVICE: 400, Tier.HOST: 600, Tier.DISK: 0}

    def test_fixed_on_a_tier_without_a_share(self):
        homes = assign([("norms", 2), ("matrix", 100)], Placement(host=1.0), {"norms": Tier.DEVICE})
        assert homes == {"norms": Tier.DEVICE, "matrix": Tier.HOST}

    def test_what_comes_first_goes_to_the_fastest_share_that_can_take_it_whole(self):
        sizes = [*((f"matrix{i}", 100) for i in range(8)), ("embedding", 150), ("head", 150)]
        halves = Placement(device=0.5, disk=0.5)
        homes = assign(sizes, halves, first=["embedding", "head"])
        assert (homes["embedding"], homes["head"]) == (Tier.DEVICE, Tier.DEVICE)
        assert realised(sizes, homes)[Tier.DEVICE] in (500, 600)
        assert assign(sizes, halves)["head"] is Tier.DISK
        small = assign(sizes, Placement(device=0.2, host=0.2, disk=0.6), first=["embedding", "head"])
        assert (small["embedding"], small["head"]) == (Tier.DEVICE, Tier.HOST)

    def test_what_is_streamed_is_spread_evenly_over_the_layers(self):
        sizes = SHAPES["opt-30b"]
        homes = assign(sizes, Placement(device=0.2, host=0.8))
        layers: dict[str, int] = {}
        for key, size in sizes:
            layer = key.partition(".")[0]
            if layer.isdigit() and homes[key] is Tier.HOST:
                layers[layer] = layers.get(layer, 0) + size
        # any five layers in a row move about as much as any other five
        moved = [layers.get(f"{i:02}", 0) for i in range(48)]
        windows = [sum(moved[i : i + 5]) for i in range(44)]
        assert max(windows) <= 1.25 * min(windows)

    def test_the_same_answer_every_time(self):
        sizes, placement = SHAPES["opt-1.3b"], Placement(device=0.3, host=0.3)
        assert assign(sizes, placement) == assign(list(sizes), placement)
