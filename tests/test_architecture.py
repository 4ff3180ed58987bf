"""The page about the architecture says what the code does, and every room has its place in the layers. That imports
point down the layers is checked by `make lint`.
"""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("write_architecture", ROOT / "docs" / "write_architecture.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def test_the_page_is_that_of_the_code():
    assert script.PAGE.read_text() == script.page(), "`make pages` writes it"


def test_every_room_is_in_a_layer():
    """What stands in no layer would not be checked."""
    package = ROOT / "hintsd_jax"
    there = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert there - {"__init__"} - set(script.ASIDE) == set(script.rooms())
