"""The site file: found, read, refused in plain words; the policy."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from icmoe.config import RunConfig
from icmoe.errors import ConfigError, PolicyError
from icmoe_client.site_file import SiteConfig, SitePolicy, find_site_file, load_site, split_address
from icmoe_client.site_template import render_site_file

EXAMPLE = Path(__file__).parents[3] / "configs" / "site" / "example.yaml"
TASK = {"name": "nuclei", "classes": {"nucleus": 255}}


def write(folder: Path, **changes: Any) -> Path:
    content = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8")) | changes
    path = folder / "hospitalA.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_example_is_what_init_writes() -> None:
    expected = render_site_file(name="hospitalA", server="fl.example.org:8443", data=Path("/data/icmoe"))
    assert EXAMPLE.read_text(encoding="utf-8") == expected


def test_example_says_every_default() -> None:
    """So that reading the file is enough to know what holds."""
    site = load_site(EXAMPLE)
    content = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    assert set(content) == set(SiteConfig.model_fields)
    assert set(content["policy"]) == set(SitePolicy.model_fields)
    assert site.policy == SitePolicy()
    assert site.address == ("fl.example.org", 8443)


def test_example_explains_every_key() -> None:
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    keys = [place for place, line in enumerate(lines) if line and not line.lstrip().startswith("#")]
    assert len(keys) == len(SiteConfig.model_fields) + len(SitePolicy.model_fields)
    assert all(lines[place - 1].lstrip().startswith("# ") for place in keys)


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, data="images", checkpoint="~/sam.pth", ca_certificate=None)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir("/")
    site = load_site(path)
    assert site.data == tmp_path / "images"
    assert site.flower_key == tmp_path / "hospitalA" / "flower.key"
    assert site.checkpoint == Path("/home/me/sam.pth")
    assert site.ca_certificate is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sever": "h:1"}, r"sever: unknown key\. Allowed here: .*receipt_key, server"),
        ({"policy": {"max_epsilonn": 3}}, r"policy\.max_epsilonn: unknown key\. Allowed here: .*max_epsilon"),
        ({"server": "https://fl.example.org"}, "host:port, such as fl.example.org:8443, without https://"),
        ({"training_hours": "at night"}, "Write them as 20:00-06:00"),
        ({"device": "gpu"}, "device: .*pattern"),
        ({"name": "a/b"}, "name: "),
        ({"policy": {"allowed_apps": ["abc"]}}, r"policy\.allowed_apps\.0"),
        ({"policy": {"max_epsilon": 0}}, r"policy\.max_epsilon"),
    ],
)
def test_refuses(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_site(write(tmp_path, **changes))
    assert str(caught.value).endswith("configs/site/example.yaml explains every key.")


@pytest.mark.parametrize("text", ["", "- a\n", "a: [", "just words", "\xff"])
def test_refuses_other_files(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"x\.yaml is not (a valid site file|valid YAML)"):
        load_site(path)


def test_refuses_another_sites_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the file of 'hospitalA', not of 'hospitalB'\. Give --site hospitalA"):
        load_site(write(tmp_path), name="hospitalB")


class TestFind:
    def test_in_order(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        own, local = tmp_path / "own", tmp_path / "configs" / "site"
        for folder in (own, local):
            folder.mkdir(parents=True)
            (folder / "a.yaml").touch()
        monkeypatch.delenv("ICMOE_SITE_DIR", raising=False)
        assert find_site_file("a", None).absolute() == local / "a.yaml"
        monkeypatch.setenv("ICMOE_SITE_DIR", str(own))
        assert find_site_file("a", None) == own / "a.yaml"
        assert find_site_file("a", local / "a.yaml") == local / "a.yaml"

    def test_names_all_places(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("ICMOE_SITE_DIR", "/mine")
        with pytest.raises(ConfigError, match=r"no b\.yaml in /mine, configs/site, /etc/icmoe-fl/site\. .*site init b"):
            find_site_file("b", None)

    def test_given_file_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"no site file .*x\.yaml"):
            find_site_file("b", tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("text", "address"),
    [("h:1", ("h", 1)), ("10.0.0.1:65535", ("10.0.0.1", 65535)), ("[2001:db8::1]:8443", ("2001:db8::1", 8443))],
)
def test_address(text: str, address: tuple[str, int]) -> None:
    assert split_address(text) == address


@pytest.mark.parametrize(
    "text", ["h", "h:", ":1", "h:0", "h:65536", "h:x", "h:²", "2001:db8::1:8443", "a@h:1", "h/x:1", "[h]:x", "[]:1"]
)
def test_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        split_address(text)


class TestPolicy:
    def test_default_admits_the_default(self) -> None:
        SitePolicy().admit(RunConfig.model_validate({"task": TASK}))

    @pytest.mark.parametrize(
        ("policy", "sentence"),
        [
            ({"require_dp": True}, "no differential privacy"),
            ({"max_epsilon": 3.0}, "no differential privacy"),
            ({"max_rounds": 9}, r"num_rounds is 10, at most 9 are allowed"),
            ({"max_local_epochs": 1}, r"local_epochs is 2, at most 1 are allowed"),
            ({"allowed_backbones": ["sam_vit_b", "sam_vit_l"]}, "is lite_medsam, allowed are sam_vit_b, sam_vit_l"),
        ],
    )
    def test_refuses(self, policy: dict[str, Any], sentence: str) -> None:
        run = RunConfig.model_validate({"task": TASK})
        with pytest.raises(PolicyError, match=sentence):
            SitePolicy.model_validate(policy).admit(run)

    @pytest.mark.parametrize(
        ("policy", "privacy", "sentence"),
        [
            ({"allow_units": ["patient"]}, {"unit": "image"}, r"privacy\.unit is image, allowed are patient"),
            ({"target_delta": 1e-6}, {}, r"target_delta is 1e-05, at most 1e-06"),
            ({"max_epsilon": 3.0}, {}, r"target_epsilon is 8\.0, at most 3\.0"),
        ],
    )
    def test_refuses_privacy_that_is_too_weak(
        self, policy: dict[str, Any], privacy: dict[str, Any], sentence: str
    ) -> None:
        run = RunConfig.model_validate({"task": TASK, "privacy": {"target_epsilon": 8.0, **privacy}})
        with pytest.raises(PolicyError, match=sentence):
            SitePolicy.model_validate(policy).admit(run)

    def test_admits_privacy_that_is_strong_enough(self) -> None:
        policy = SitePolicy(require_dp=True, max_epsilon=8.0, allow_units=("patient",))
        policy.admit(RunConfig.model_validate({"task": TASK, "privacy": {"target_epsilon": 8.0}}))
        policy.admit(RunConfig.model_validate({"task": TASK, "privacy": {"noise_multiplier": 1.5}}))

    def test_admits_at_the_limit(self) -> None:
        policy = SitePolicy(max_rounds=10, max_local_epochs=2, allowed_backbones=("lite_medsam",))
        policy.admit(RunConfig.model_validate({"task": TASK}))

    def test_says_all_at_once(self) -> None:
        with pytest.raises(PolicyError, match=r"num_rounds.*local_epochs.*ask the site"):
            SitePolicy(max_rounds=1, max_local_epochs=1).admit(RunConfig.model_validate({"task": TASK}))

    def test_data(self) -> None:
        policy = SitePolicy(min_train_images=10, max_skipped_share=0.1)
        policy.admit_data(num_train=10, num_usable=18, num_skipped=2)
        with pytest.raises(PolicyError, match="fewer than 10 usable training images") as few:
            policy.admit_data(num_train=7, num_usable=18, num_skipped=0)
        assert "7" not in str(few.value)
        with pytest.raises(PolicyError, match="more than 10% of its images"):
            policy.admit_data(num_train=10, num_usable=17, num_skipped=3)
