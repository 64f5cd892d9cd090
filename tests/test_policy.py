"""Placement, Compression and Policy: what they accept, what they refuse, and the words of the refusal."""

import copy
import dataclasses
import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen_hf import Compression, FlexGenError, Placement, Policy, PolicyError, Tier


@st.composite
def placements(draw):
    device = draw(st.integers(0, 1000))
    host = draw(st.integers(0, 1000 - device))
    return Placement(device=device / 1000, host=host / 1000)


BITS = [None, 2, 3, 4, 8]
COMPRESSIONS = st.builds(
    Compression,
    weights=st.sampled_from(BITS),
    cache=st.sampled_from([*BITS, 16]),
    group_size=st.sampled_from([8, 32, 64, 128]),
    tables=st.sampled_from(BITS),
    patterns=st.dictionaries(st.sampled_from(["*.fc2", "*.q_proj", "*"]), st.sampled_from(BITS)),
)
POLICIES = st.builds(
    Policy,
    weights=placements(),
    cache=placements(),
    hidden=placements(),
    batch_size=st.integers(1, 4096),
    num_batches=st.integers(1, 512),
    overlap=st.booleans(),
    compression=COMPRESSIONS,
    host_attention=st.booleans(),
)


class TestPlacement:
    @given(placements())
    def test_shares_sum_to_one_and_lie_between_zero_and_one(self, placement):
        shares = [placement.share(tier) for tier in Tier]
        assert sum(shares) == pytest.approx(1, abs=1e-6)
        assert all(0 <= share <= 1 for share in shares)

    @given(placements())
    def test_the_dict_is_the_way_back(self, placement):
        assert Placement(**placement.to_dict()) == placement

    def test_what_is_not_given_is_on_disk(self):
        assert Placement(device=0.2, host=0.3) == Placement(device=0.2, host=0.3, disk=0.5)
        assert Placement().disk == 1
        assert Placement(device=0.1, host=0.2).disk == 0.7, "and is not 0.7000000000000001"

    @pytest.mark.parametrize("tier", list(Tier))
    def test_all_on_one_tier(self, tier):
        assert Placement.all_on(tier).share(tier) == 1
        assert Placement.all_on(tier.value) == Placement.all_on(tier)

    def test_percents_are_the_originals(self):
        assert Placement(device=0.2, host=0.55).percents() == (20, 55)

    @pytest.mark.parametrize(
        ("shares", "words"),
        [
            ({"device": -0.1}, "device=-0.1 is outside 0..1"),
            ({"device": 20}, "device=20 is outside 0..1; shares are fractions, 20 percent is 0.2"),
            ({"host": "half"}, "host='half' is not a number"),
            ({"host": True}, "host=True is not a number"),
            ({"device": float("nan")}, "device=nan is not a number"),
            ({"disk": float("inf")}, "disk=inf is not a number"),
            ({"device": 0.7, "host": 0.7}, "device + host = 1.4 is more than 1; lower one of them"),
            ({"device": 0.2, "host": 0.2, "disk": 0.2}, "device + host + disk = 0.6, not 1; leave out disk"),
        ],
    )
    def test_refusals(self, shares, words):
        with pytest.raises(PolicyError) as refusal:
            Placement(**shares)
        assert words in str(refusal.value)

    def test_it_is_frozen_and_hashable(self):
        placement = Placement(device=1)
        with pytest.raises(dataclasses.FrozenInstanceError):
            placement.device = 0.5  # type: ignore[misc]
        assert len({placement, Placement(device=1.0)}) == 1

    def test_an_unknown_tier_is_refused(self):
        with pytest.raises(ValueError, match="gpu"):
            Placement.all_on("gpu")


class TestCompression:
    def test_off_is_false(self):
        assert not Compression()
        assert Compression(weights=4)
        assert Compression(cache=8)

    def test_what_a_user_may_write(self):
        four = Compression(weights=4, cache=4)
        assert Compression.of("4bit") == four
        assert Compression.of(four) is four
        assert Compression.of({"weights": 4, "cache": 4}) == four
        assert Compression.of('{"weights": 4, "cache": 4}') == four
        assert Compression.of(None) == Compression()
        pairs = Compression(patterns=(("*.fc2", 8), ("*.k_proj", None)))
        assert Compression(patterns={"*.fc2": 8, "*.k_proj": None}) == pairs
        assert Compression.of(json.loads(json.dumps(pairs.to_dict()))) == pairs

    def test_whether_weights_are_quantized(self):
        for made in (Compression(weights=4), Compression(tables=8), Compression(patterns={"*.fc2": 8})):
            assert made
            assert made.of_weights
        for made in (Compression(), Compression(cache=4), Compression(patterns={"*": None})):
            assert not made.of_weights

    def test_the_first_pattern_that_fits_says_the_width(self):
        made = Compression(weights=4, patterns={"*.fc2": 8, "*.fc?": 3, "*.q_proj.weight": None})
        names = {"fc2.weight": 8, "fc1.weight": 3, "q_proj.weight": None, "k_proj.weight": 4, "fc2": 8}
        assert {name: made.bits(f"model.layers.0.{name}", 4) for name in names} == names
        assert made.bits("model.LAYERS.0.FC2.weight", 2) == 2, "names have their case"

    @given(COMPRESSIONS)
    def test_the_dict_is_the_way_back(self, compression):
        assert Compression(**compression.to_dict()) == compression

    @pytest.mark.parametrize(
        ("value", "words"),
        [
            ({"weights": 5}, "weights=5 bits do not exist; use 2, 3, 4, 8 or None"),
            ({"cache": True}, "cache=True bits do not exist"),
            ({"cache": 32}, "cache=32 bits do not exist; use 2, 3, 4, 8, 16 or None"),
            ({"weights": 16}, "weights=16 bits do not exist; use 2, 3, 4, 8 or None"),
            ({"group_size": 0}, "group_size=0 must be a positive multiple of 8"),
            ({"group_size": 60}, "group_size=60 must be a positive multiple of 8"),
            ({"group_size": 64.0}, "group_size=64.0 must be a positive multiple of 8"),
            ({"weight": 4}, "unknown field 'weight'; did you mean 'weights'?"),
            ("5bit", "'5bit' is unknown; use '4bit'"),
            ("{", "compression: not JSON"),
            ({"tables": 5}, "tables=5 bits do not exist; use 2, 3, 4, 8 or None"),
            ({"patterns": {"*.fc2": 16}}, "patterns['*.fc2']=16 bits do not exist; use 2, 3, 4, 8 or None"),
            ({"patterns": {3: 4}}, "patterns={3: 4} are not names with bits; use {'*.fc2': 8}"),
            ({"patterns": "*.fc2"}, "patterns='*.fc2' are not names with bits"),
            ({"patterns": 8}, "patterns=8 are not names with bits"),
        ],
    )
    def test_refusals(self, value, words):
        with pytest.raises(PolicyError) as refusal:
            Compression.of(value)
        assert words in str(refusal.value)


class TestPolicy:
    @given(POLICIES)
    def test_json_round_trip(self, policy):
        assert Policy.from_json(policy.to_json()) == policy
        assert Policy.from_dict(policy.to_dict()) == policy
        assert Policy.of(policy.to_json()) == policy

    @given(POLICIES)
    def test_copies_are_equal(self, policy):
        assert pickle.loads(pickle.dumps(policy)) == policy  # noqa: S301  our own bytes
        assert copy.deepcopy(policy) == policy
        assert hash(policy) == hash(policy.replace())

    def test_the_json_is_this(self):
        assert json.loads(Policy().to_json()) == {
            "weights": {"device": 1.0, "host": 0.0, "disk": 0.0},
            "cache": {"device": 1.0, "host": 0.0, "disk": 0.0},
            "hidden": {"device": 1.0, "host": 0.0, "disk": 0.0},
            "batch_size": 8,
            "num_batches": 1,
            "overlap": True,
            "compression": {"weights": None, "cache": None, "group_size": 64, "tables": None, "patterns": {}},
            "host_attention": False,
            "layer_slots": 2,
        }

    @given(placements(), placements(), placements())
    def test_six_percentages(self, weights, cache, hidden):
        text = " ".join(f"{part:g}" for placement in (weights, cache, hidden) for part in placement.percents())
        parsed = Policy.parse(text)
        for name, expected in (("weights", weights), ("cache", cache), ("hidden", hidden)):
            for tier in Tier:
                assert getattr(parsed, name).share(tier) == pytest.approx(expected.share(tier), abs=1e-6)

    def test_the_originals_example(self):
        policy = Policy.parse("20 80 0 100 0 100", batch_size=48, num_batches=3)
        assert policy.weights == Placement(device=0.2, host=0.8)
        assert policy.cache == policy.hidden == Placement(host=1.0)
        assert policy.block_size == 144
        assert policy == Policy.parse([20, 80, 0, 100, 0, 100], batch_size=48, num_batches=3)
        assert policy == Policy.parse("20,80,0,100,0,100", batch_size=48, num_batches=3)

    @pytest.mark.parametrize(
        ("percents", "words"),
        [
            ("20 80 0 100", "has 4 numbers, not 6"),
            ("20 80 0 100 0 100 7", "has 7 numbers, not 6"),
            ("", "has 0 numbers, not 6"),
            ("20 80 0 100 0 all", "holds something that is not a number"),
            ("20 90 0 100 0 100", "weights 20 + 90 percent is outside 0..100"),
            ("20 80 -1 100 0 100", "cache -1 + 100 percent is outside 0..100"),
            ("20 80 0 100 0 nan", "hidden 0 + nan percent is outside 0..100"),
        ],
    )
    def test_refused_percentages(self, percents, words):
        with pytest.raises(PolicyError) as refusal:
            Policy.parse(percents)
        assert words in str(refusal.value)
        assert "'20 80 0 100 0 100'" in str(refusal.value)

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"wieghts": {}}, "unknown field 'wieghts'; did you mean 'weights'?"),
            ({"zzz": 1}, "unknown field 'zzz'; known are weights, cache, hidden"),
            ({"weights": {"gpu": 1}}, "policy: weights: unknown field 'gpu'"),
            ({"weights": 0.5}, "weights=0.5 is not a Placement"),
            ({"batch_size": 0}, "batch_size=0 must be a whole number of at least 1"),
            ({"batch_size": -4}, "batch_size=-4 must be"),
            ({"batch_size": True}, "batch_size=True must be"),
            ({"num_batches": 2.0}, "num_batches=2.0 must be"),
            ({"overlap": "yes"}, "overlap='yes' must be True or False"),
            ({"host_attention": 1}, "host_attention=1 must be True or False"),
            ({"compression": {"weights": 5}}, "weights=5 bits do not exist"),
        ],
    )
    def test_refused_fields(self, fields, words):
        with pytest.raises(PolicyError) as refusal:
            Policy.from_dict(fields)
        assert words in str(refusal.value)

    @pytest.mark.parametrize(
        ("text", "words"), [("{", "not JSON"), ("[1]", "the JSON holds a list"), ("3", "the JSON holds a int")]
    )
    def test_refused_json(self, text, words):
        with pytest.raises(PolicyError, match="policy") as refusal:
            Policy.from_json(text)
        assert words in str(refusal.value)

    def test_what_a_user_may_write(self, tmp_path):
        policy = Policy.parse("20 80 0 100 0 100", batch_size=4)
        file = tmp_path / "policy.json"
        file.write_text(policy.to_json())
        assert Policy.of(policy) is policy
        for written in (policy.to_dict(), policy.to_json(), file, str(file)):
            assert Policy.of(written) == policy
        assert Policy.of("20 80 0 100 0 100", batch_size=4) == policy
        assert Policy.of(file, batch_size=9) == policy.replace(batch_size=9)

    def test_a_missing_file_is_named(self):
        with pytest.raises(PolicyError, match=r"cannot read '/nowhere/policy.json' \(No such file"):
            Policy.of(Path("/nowhere/policy.json"))

    def test_replace_checks_like_new(self):
        assert Policy().replace(batch_size=2).batch_size == 2
        with pytest.raises(PolicyError, match="batch_size=0"):
            Policy().replace(batch_size=0)
        with pytest.raises(PolicyError, match="did you mean 'batch_size'"):
            Policy().replace(batchsize=2)

    def test_a_refusal_is_also_a_value_error(self):
        assert issubclass(PolicyError, ValueError)
        assert issubclass(PolicyError, FlexGenError)

    def test_it_reads_as_one_line(self):
        policy = Policy.parse("20 80 0 100 0 100", batch_size=4, num_batches=3, overlap=False)
        assert str(policy) == (
            "weights 20/80/0  cache 0/100/0  hidden 0/100/0 (% on device/host/disk), block 4 x 3, no overlap"
        )


@pytest.mark.parametrize(
    ("compression", "text"),
    [
        (Compression(), ""),
        (Compression.of("4bit"), "weights 4 bit, cache 4 bit"),
        (Compression(tables=8, group_size=32), "tables 8 bit, groups of 32"),
        (Compression(weights=3, patterns={"*.fc2": 8, "*.fc1": None}), "weights 3 bit, *.fc2 8 bit, *.fc1 as it is"),
    ],
)
def test_a_compression_says_what_it_is_in_few_words(compression: Compression, text: str) -> None:
    assert str(compression) == text


@pytest.mark.parametrize(("name", "tier"), [(0, "device"), ("1", "device"), ("device", "device"), ("cpu", "host"),
                                            ("host", "host"), ("disk", "disk")])  # fmt: skip
def test_tiers_of_max_memory(name: object, tier: str) -> None:
    assert Tier.of(name) is Tier(tier)


@pytest.mark.parametrize("name", ["gpu", None, "", -1])
def test_names_of_no_tier(name: object) -> None:
    with pytest.raises(PolicyError, match="is no tier; use 0"):
        Tier.of(name)
