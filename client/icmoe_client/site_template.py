"""The text of a site file: every key of ``SiteConfig`` with its own description, so that neither can be forgotten."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from icmoe_client.site_file import SiteConfig, SitePolicy

SITE_FILES: Mapping[str, str] = {
    "ca_certificate": "ca.crt",
    "flower_key": "flower.key",
    "receipt_key": "receipt.key",
    "state_dir": "state",
}
"""Key of the site file -> name in the folder ``NAME`` beside it."""

_WIDTH = 110


def render_site_file(*, name: str, server: str, data: Path) -> str:
    """Write out a site file with all defaults.

    Args:
        name: of the site.
        server: of the centre, host:port.
        data: folder with ``manifest.csv``.
    """
    given = {"name": name, "server": server, "data": str(data)}
    given |= {key: f"{name}/{file}" for key, file in SITE_FILES.items()}
    head = (
        f"# Site file of {name}, for 'icmoe-fl client --site {name}'. It stays at the hospital and is never sent.\n"
        "# Relative paths are relative to this file. 'icmoe-fl client --check' tells what is wrong, if anything is.\n"
    )
    policy = [f"{_comment(SiteConfig, 'policy')}policy:\n", *_lines(SitePolicy, {}, indent="  ")]
    return "\n".join([head, *_lines(SiteConfig, given, leave_out="policy"), "".join(policy)])


def _lines(model: type[BaseModel], given: Mapping[str, Any], *, indent: str = "", leave_out: str = "") -> list[str]:
    lines = []
    for key, field in model.model_fields.items():
        if key != leave_out:
            value = given[key] if key in given else field.get_default()
            plain = list(value) if isinstance(value, tuple) else value
            # Lists on one line, as [a, b]; a mapping of one scalar would get braces that way.
            text = yaml.safe_dump(
                {key: plain}, default_flow_style=None if isinstance(plain, list) else False, width=1000
            )
            lines.append(_comment(model, key, indent=indent) + indent + text)
    return lines


def _comment(model: type[BaseModel], key: str, *, indent: str = "") -> str:
    lines = textwrap.wrap(model.model_fields[key].description or "", _WIDTH, break_long_words=False)
    return "".join(f"{indent}# {line}\n" for line in lines)
