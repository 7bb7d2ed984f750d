import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from icmoe.config import RunConfig, parse_run_config

few = settings(max_examples=40, deadline=None, database=None, derandomize=True)

positive = st.floats(1e-6, 1e3)
counts = st.integers(1, 100)
names = st.text(min_size=1, max_size=8)


@st.composite
def tasks(draw: st.DrawFn) -> dict[str, Any]:
    values = draw(st.lists(st.integers(1, 65535), min_size=2, max_size=5, unique=True))
    classes = draw(st.lists(names, min_size=len(values) - 1, max_size=len(values) - 1, unique=True))
    return {
        "name": draw(names),
        "classes": dict(zip(classes, values[1:], strict=True)),
        "ignore": draw(st.sampled_from([[], values[:1]])),
        "note": draw(st.text(max_size=8)),
    }


experts = st.fixed_dictionaries(
    {"basic": st.integers(0, 3), "semantic": st.integers(0, 3), "adaptive": st.integers(1, 3)}
)
models = st.fixed_dictionaries(
    {},
    optional={
        "backbone": st.sampled_from(["lite_medsam", "sam_vit_b"]),
        "experts": experts,
        "width": st.sampled_from([16, 32, 64, 128]),
        "temperature": positive,
        "logit_stride": st.none() | st.integers(1, 16),
        "top_k": st.none() | st.just(1),
        "voting": st.sampled_from(["ppav", "softmax"]),
    },
)
trains = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**31),
        "batch_size": counts,
        "learning_rate": positive,
        "views": st.lists(st.sampled_from(["identity", "hflip", "rot90", "affine3"]), min_size=1, max_size=3),
        "loss": st.fixed_dictionaries({}, optional={"balance": positive, "contrast_anchors": st.integers(6, 200)}),
    },
)
federations = st.fixed_dictionaries(
    {},
    optional={
        "num_rounds": counts,
        "strategy": st.sampled_from(["fedavg", "fedprox", "fedadam", "fedyogi"]),
        "expert_weighting": st.sampled_from(["examples", "votes"]),
        "scope": st.fixed_dictionaries({}, optional={"norm": st.just("local"), "basic": st.just("local")}),
        "communication": st.fixed_dictionaries({}, optional={"dtype": st.just("float16")}),
    },
)
raws = st.fixed_dictionaries({"task": tasks()}, optional={"model": models, "train": trains, "federation": federations})


def turned(value: Any) -> Any:
    """The same mapping with its keys the other way round; the order of classes means something and stays."""
    if not isinstance(value, dict):
        return value
    return {key: each if key == "classes" else turned(each) for key, each in reversed(value.items())}


@few
@given(raws)
def test_json_round_trip(raw: dict[str, Any]) -> None:
    config = parse_run_config(raw, source="drawn")
    back = parse_run_config(config.model_dump_json(), source="wire")
    assert back == config
    assert list(back.task.classes) == list(config.task.classes)
    assert back.digest() == config.digest()


@few
@given(raws)
def test_the_order_of_keys_does_not_change_the_digest(raw: dict[str, Any]) -> None:
    assert parse_run_config(turned(raw), source="turned").digest() == parse_run_config(raw, source="drawn").digest()


@few
@given(raws, raws)
def test_configs_are_equal_where_their_digests_are(one: dict[str, Any], other: dict[str, Any]) -> None:
    first, second = parse_run_config(one, source="one"), parse_run_config(other, source="other")
    assert (first.digest() == second.digest()) == (first.model_dump_json() == second.model_dump_json())


@few
@given(raws)
def test_a_config_written_out_is_a_config(raw: dict[str, Any]) -> None:
    config = parse_run_config(raw, source="drawn")
    assert RunConfig.model_validate(json.loads(json.dumps(config.model_dump(mode="json")))) == config
