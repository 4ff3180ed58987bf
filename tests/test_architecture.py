"""The page about the architecture says what the code does; that imports point one way is checked by `make lint`."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "docs" / "write_architecture.py"


def test_the_page_is_that_of_the_code():
    spec = importlib.util.spec_from_file_location("write_architecture", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text() == script.page(), "python docs/write_architecture.py writes it"
