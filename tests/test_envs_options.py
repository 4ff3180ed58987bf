"""What `env.options` may be, for every environment that reads them with `envs.options`."""

import pytest

from hintsd_jax.envs.appworld.options import Options as AppWorld
from hintsd_jax.envs.bfcl.options import Options as Bfcl
from hintsd_jax.errors import UserError


@pytest.mark.parametrize("options", [Bfcl, AppWorld])
def test_an_unknown_option_and_one_of_another_type_are_one_line(options):
    assert options.parse({}) == options()
    for wrong in ("x", 1.5, True, None, [3]):
        with pytest.raises(UserError, match=r"env\.options\.max_observation_chars is .*: give a value of type int"):
            options.parse({"max_observation_chars": wrong})
    with pytest.raises(
        UserError,
        match="env.options.max_observation_char: environment .* such option; did you mean 'max_observation_chars'",
    ):
        options.parse({"max_observation_char": 5})


def test_a_list_is_a_tuple_and_a_whole_number_a_number():
    assert Bfcl.parse({"categories": ["multi_turn_base"]}).categories == ["multi_turn_base"]
    assert AppWorld.parse({"cell_timeout_s": 3}).cell_timeout_s == 3
