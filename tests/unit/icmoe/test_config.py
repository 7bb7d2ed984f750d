import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from icmoe.config import UNWEIGHTED_STRATEGIES, RunConfig, load_run_config, parse_run_config
from icmoe.errors import ConfigError

TASK: dict[str, Any] = {"name": "discs", "classes": {"disc": 1}}


def parse(**sections: Any) -> RunConfig:
    return parse_run_config({"task": TASK} | sections, source="test.yaml")


def refuse(match: str, **sections: Any) -> None:
    with pytest.raises(ConfigError, match=match) as refusal:
        parse(**sections)
    assert "test.yaml" in str(refusal.value)
    assert refusal.value.exit_code == 2


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


YAML = "task: {name: discs, classes: {disc: 1}}\ntrain:\n  batch_size: 2\n"


class TestRefusals:
    @pytest.mark.parametrize(
        ("sections", "path", "allowed"),
        [
            ({"modle": {}}, "modle", "federation, model, privacy, simulation, task, train"),
            ({"model": {"num_expert": 4}}, r"model\.num_expert", "backbone"),
            ({"model": {"experts": {"basics": 1}}}, r"model\.experts\.basics", "adaptive, basic, semantic"),
            ({"train": {"loss": {"dice": 1.0}}}, r"train\.loss\.dice", "balance, consistency"),
            ({"federation": {"scope": {"norms": "local"}}}, r"federation\.scope\.norms", "adaptive, basic, norm"),
        ],
    )
    def test_an_unknown_key_names_its_path_and_what_is_allowed(
        self, sections: dict[str, Any], path: str, allowed: str
    ) -> None:
        refuse(rf"{path}: unknown key. Allowed here: .*{allowed}", **sections)

    @pytest.mark.parametrize(
        ("sections", "message"),
        [
            ({"privacy": {}}, "privacy: .*either noise_multiplier or target_epsilon"),
            ({"privacy": {"noise_multiplier": 1.0, "target_epsilon": 8.0}}, "privacy: .*either noise_multiplier or"),
            (
                {"privacy": {"target_epsilon": 8.0}, "federation": {"expert_weighting": "votes"}},
                "votes are unnoised counts",
            ),
            (
                {"privacy": {"target_epsilon": 8.0}, "federation": {"communication": {"min_expert_share": 0.1}}},
                "which experts are left out tells of the data",
            ),
            ({"train": {"batch_size": "many"}}, r"train\.batch_size: .*integer.*'many'"),
            ({"train": {"batch_size": 0}}, r"train\.batch_size: .*greater than or equal to 1.*0"),
            ({"train": {"learning_rate": -1.0}}, r"train\.learning_rate: .*greater than 0.*-1"),
            ({"train": {"views": ["upside_down"]}}, r"train\.views\.0: .*'upside_down'"),
            ({"train": {"views": []}}, r"train\.views: .*at least 1"),
            ({"train": {"precision": "fp8"}}, r"train\.precision: .*'fp32' or 'bf16'.*'fp8'"),
            ({"model": {"backbone": "resnet"}}, r"model\.backbone: .*'lite_medsam'.*'resnet'"),
            ({"model": {"width": 12}}, r"model\.width: .*multiple of"),
            ({"model": {"image_size": 100}}, r"model\.image_size: .*multiple of 16"),
            ({"model": {"experts": {"basic": 0, "semantic": 0, "adaptive": 0}}}, r"model\.experts: .*at least one"),
            ({"model": {"top_k": 5}}, "model: .*top_k 5 is more than the 4 experts"),
            ({"train": {"loss": {"balance": -0.1}}}, r"train\.loss\.balance: .*greater than or equal to 0"),
            ({"federation": {"num_rounds": 0}}, r"federation\.num_rounds"),
            ({"federation": {"trim": 0.5}}, r"federation\.trim"),
            ({"federation": {"communication": {"dtype": "int8"}}}, r"federation\.communication\.dtype"),
            ({"federation": {"strategy": "fedsgd"}}, r"federation\.strategy: .*'fedavg'"),
            ({"simulation": {"dropout": 1.0}}, r"simulation\.dropout"),
            ({"simulation": {"partition": "iid"}}, "simulation: .*num_sites"),
            ({"simulation": {"num_sites": 3}}, "simulation: .*num_sites"),
            ({"task": None}, "task: "),
            ({"train": 3}, "train: "),
        ],
    )
    def test_a_wrong_type_or_range_names_its_path(self, sections: dict[str, Any], message: str) -> None:
        refuse(message, **sections)

    @pytest.mark.parametrize(
        ("task", "message"),
        [
            ({"name": "", "classes": {"disc": 1}}, r"task\.name"),
            ({"name": "x", "classes": {}}, r"task\.classes"),
            ({"name": "x"}, r"task\.classes: Field required"),
            ({"name": "x", "classes": {"disc": 0}}, "0 is background"),
            ({"name": "x", "classes": {"a": 1, "b": 1}}, "may stand once"),
            ({"name": "x", "classes": {"a": 1}, "ignore": [1]}, "may stand once"),
            ({"name": "x", "classes": {f"c{n}": n for n in range(1, 256)}}, "classes"),
        ],
    )
    def test_a_wrong_task_is_refused(self, task: dict[str, Any], message: str) -> None:
        """Also 255 classes: id 255 means that a pixel counts nowhere."""
        refuse(message, task=task)

    def test_every_wrong_key_gets_its_line(self) -> None:
        with pytest.raises(ConfigError) as refusal:
            parse(train={"batch_size": 0, "seed": -1}, model={"widht": 64})
        assert len(str(refusal.value).splitlines()) == 4

    @pytest.mark.parametrize("strategy", UNWEIGHTED_STRATEGIES)
    def test_unweighted_strategies_refuse_votes_and_shares(self, strategy: str) -> None:
        message = rf"federation: .*{strategy} takes no weights"
        refuse(message, federation={"strategy": strategy, "expert_weighting": "votes"})
        refuse(message, federation={"strategy": strategy, "communication": {"min_expert_share": 0.1}})
        assert parse(federation={"strategy": strategy}).federation.strategy == strategy

    def test_all_scopes_local_is_refused(self) -> None:
        local = dict.fromkeys(("basic", "semantic", "adaptive", "router"), "local")
        refuse("nothing would be federated", federation={"scope": local})
        assert parse(federation={"scope": local | {"router": "global"}}).federation.scope.basic == "local"

    @pytest.mark.parametrize("text", ["not json", "[]", "{", '"x"'])
    def test_broken_json_is_refused(self, text: str) -> None:
        with pytest.raises(ConfigError, match="the centre's config is not a valid run config"):
            parse_run_config(text, source="the centre's config")

    @pytest.mark.parametrize("value", [float("inf"), float("nan")])
    def test_a_number_that_json_cannot_hold_is_refused(self, value: float) -> None:
        """It would arrive as null at the sites."""
        refuse(r"federation\.round_deadline", federation={"round_deadline": value})

    def test_a_config_cannot_be_changed(self) -> None:
        config = parse()
        with pytest.raises(ValidationError, match="frozen"):
            config.train.seed = 3


class TestDigest:
    def test_the_same_config_by_any_way_has_the_same_digest(self, tmp_path: Path) -> None:
        config = parse(train={"batch_size": 2})
        assert config.digest() == load_run_config(write(tmp_path, YAML)).digest()
        assert config.digest() == parse_run_config(config.model_dump_json(), source="wire").digest()
        assert config.digest() == parse_run_config(config.model_dump(), source="dict").digest()
        assert len(config.digest()) == 64

    def test_defaults_written_out_do_not_change_it(self) -> None:
        assert parse(train={"batch_size": 4}, model={}).digest() == parse().digest()

    def test_the_order_of_keys_does_not_change_it(self) -> None:
        sections = {"train": {"seed": 1, "batch_size": 2}, "model": {"width": 32, "top_k": 2}}
        turned = {name: dict(reversed(section.items())) for name, section in reversed(sections.items())}
        assert parse(**sections).digest() == parse(**turned).digest()

    @pytest.mark.parametrize(
        "change",
        [
            {"train": {"seed": 1}},
            {"model": {"top_k": 2}},
            {"federation": {"num_rounds": 11}},
            {"task": TASK | {"ignore": [9]}},
        ],
    )
    def test_any_change_changes_it(self, change: dict[str, Any]) -> None:
        assert parse(**change).digest() != parse().digest()

    def test_the_order_of_classes_changes_it(self) -> None:
        """Class ids follow the order: the two configs train models whose outputs mean different things."""
        one, other = ({"name": "x", "classes": dict(pairs)} for pairs in ([("a", 1), ("b", 2)], [("b", 2), ("a", 1)]))
        assert parse(task=one).digest() != parse(task=other).digest()


class TestFile:
    def test_reads_yaml_and_fills_in_defaults(self, tmp_path: Path) -> None:
        config = load_run_config(write(tmp_path, YAML))
        assert config.train.batch_size == 2
        assert config.model.backbone == "lite_medsam"
        assert config.task.num_classes == 2

    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            ("train.batch_size=8", ("train", "batch_size", 8)),
            ("train.learning_rate=1e-3", ("train", "learning_rate", 1e-3)),
            ("train.views=[identity, hflip]", ("train", "views", ("identity", "hflip"))),
            ("model.top_k=2", ("model", "top_k", 2)),
            ("model.top_k=null", ("model", "top_k", None)),
            ("federation.strategy=fedprox", ("federation", "strategy", "fedprox")),
            ("task.note=a = b", ("task", "note", "a = b")),
        ],
    )
    def test_overrides(self, tmp_path: Path, override: str, expected: tuple[str, str, Any]) -> None:
        section, key, value = expected
        config = load_run_config(write(tmp_path, YAML), [override])
        assert getattr(getattr(config, section), key) == value

    def test_the_last_override_wins_and_the_rest_of_the_section_stays(self, tmp_path: Path) -> None:
        config = load_run_config(write(tmp_path, YAML), ["train.seed=1", "train.seed=2", "train.loss.balance=0"])
        assert (config.train.seed, config.train.loss.balance, config.train.batch_size) == (2, 0.0, 2)

    def test_an_override_in_an_empty_section(self, tmp_path: Path) -> None:
        """``train:`` with all its lines commented out is None in YAML."""
        path = write(tmp_path, "task: {name: discs, classes: {disc: 1}}\ntrain:\n")
        assert load_run_config(path, ["train.seed=3"]).train.seed == 3

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("train.batch_size", "takes KEY=VALUE"),
            ("=3", "takes KEY=VALUE"),
            ("train.batchsize=3", r"train\.batchsize: unknown key. Allowed here: .*batch_size"),
            ("train.batch_size.x=3", "'batch_size' is a value, not a section"),
            ("train.views=[", "not valid YAML"),
            ("train.batch_size=zero", r"train\.batch_size"),
        ],
    )
    def test_a_wrong_override_is_refused(self, tmp_path: Path, override: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            load_run_config(write(tmp_path, YAML), [override])

    @pytest.mark.parametrize(
        ("text", "message"),
        [("", "must hold a mapping"), ("- 1", "must hold a mapping"), ("a: [", "not valid YAML"), ("1: 2", "task")],
    )
    def test_a_file_that_is_no_config(self, tmp_path: Path, text: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            load_run_config(write(tmp_path, text))

    def test_a_file_that_is_not_text(self, tmp_path: Path) -> None:
        path = tmp_path / "run.yaml"
        path.write_bytes(b"\xff\xfe\x00binary")
        with pytest.raises(ConfigError, match="not valid YAML"):
            load_run_config(path)

    @pytest.mark.parametrize("name", ["absent.yaml", "."])
    def test_a_missing_file_or_a_folder(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ConfigError, match="cannot read the run config"):
            load_run_config(tmp_path / name)


def test_json_round_trip() -> None:
    config = parse(
        train={"views": ["identity", "rot90"], "loss": {"balance": 0.1}},
        federation={"strategy": "fedprox", "scope": {"norm": "local"}, "communication": {"dtype": "float16"}},
        simulation={"partition": "dirichlet", "num_sites": 3},
    )
    assert parse_run_config(config.model_dump_json(), source="wire") == config
    assert RunConfig.model_validate(json.loads(config.model_dump_json())) == config
    assert list(parse(task={"name": "x", "classes": {"b": 2, "a": 1}}).task.classes) == ["b", "a"]
