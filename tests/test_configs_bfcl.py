"""The page says what the paper released and what the config sets: both are compared with the built config."""

import ast
import re
from pathlib import Path

from hintsd_jax.config import build
from hintsd_jax.configs import bfcl_qwen3_4b, bfcl_qwen3_4b_clean
from hintsd_jax.envs.bfcl.options import Options

PAGE = (Path(__file__).parents[1] / "docs" / "bfcl.md").read_text(encoding="utf-8")


def released_rows():
    table = re.search(r"<!-- released: begin -->\n(.*?)<!-- released: end -->", PAGE, re.DOTALL)[1]
    for line in table.splitlines()[2:]:
        setting, released, key, here, why = (cell.strip() for cell in line.strip().strip("|").split("|"))
        literal = lambda cell: ast.literal_eval(cell.strip("`"))
        yield setting, literal(released), key.strip("`"), literal(here), why


def test_the_config_has_the_released_settings():
    config, keys = build.build(bfcl_qwen3_4b.get_config()).to_dict(), []
    for setting, released, key, here, why in released_rows():
        value = config
        for part in key.split("."):
            value = value[part]
        assert value == here and type(value) is type(here), setting
        assert bool(why) or released == here, setting
        keys.append(key)
    assert len(keys) == len(set(keys)) > 40


def test_every_option_of_the_configs_is_one_and_calls_end_turns_as_in_published_numbers():
    for module in (bfcl_qwen3_4b, bfcl_qwen3_4b_clean):
        options = Options.parse(module.get_config().env.options.to_dict())
        assert options.unreadable_calls == "end_turn"
    assert f"| `{options.__class__.__dataclass_fields__['unreadable_calls'].name}` |" in PAGE
