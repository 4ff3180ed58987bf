"""config.json of each family in and out, and everything in it that is refused."""

import json
import pathlib

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hintsd_jax.errors import UserError
from hintsd_jax.models import rope
from hintsd_jax.models.config import ExpertsConfig, PolicyConfig
from hintsd_jax.models.families import FAMILIES
from hintsd_jax.models.rope_scaling import LinearScaling, Llama3Scaling, YarnScaling

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
NAMES = sorted(path.parent.name for path in FIXTURES.glob("*/expected.npz"))
HF = json.loads((FIXTURES / "qwen3_tiny_tied" / "config.json").read_text())
MISTRAL = json.loads((FIXTURES / "mistral_tiny_tied" / "config.json").read_text())
SMOLLM3 = json.loads((FIXTURES / "smollm3_tiny_tied" / "config.json").read_text())
MOE = json.loads((FIXTURES / "qwen3_moe_tiny_plain" / "config.json").read_text())
LLAMA = json.loads((FIXTURES / "llama_tiny_tied" / "config.json").read_text())  # with rope_theta and rope_scaling
SCALED = LLAMA["rope_scaling"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
OLMO3 = json.loads((FIXTURES / "olmo3_tiny_untied" / "config.json").read_text())
GEMMA3 = json.loads((FIXTURES / "gemma3_tiny_tied" / "config.json").read_text())  # in its older form


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_through_both_forms_of_the_rope_settings(name):
    config = PolicyConfig.from_hf(json.loads((FIXTURES / name / "config.json").read_text()))
    hf = config.to_hf()
    assert PolicyConfig.from_hf(hf) == config
    assert PolicyConfig.from_hf({key: value for key, value in hf.items() if key != "rope_parameters"}) == config
    old = ("rope_theta", "rope_scaling", "rope_local_base_freq")
    assert PolicyConfig.from_hf({key: value for key, value in hf.items() if key not in old}) == config
    assert config.family == name.split("_tiny")[0] and json.loads(json.dumps(hf)) == hf


def test_what_the_families_are():
    assert {name: (family.qk_norm, family.qkv_bias, family.has_experts) for name, family in FAMILIES.items()} == {
        "qwen3": ("each_head", False, False),
        "qwen3_moe": ("each_head", False, True),
        "qwen2": ("none", True, False),
        "llama": ("none", False, False),
        "mistral": ("none", False, False),
        "smollm3": ("none", False, False),
        "olmo2": ("all_heads", False, False),
        "olmo3": ("all_heads", False, False),
        "gemma3": ("each_head", False, False),
    }
    config = PolicyConfig.from_hf(LLAMA)
    assert (config.switches, config.rope_scaling) == (FAMILIES["llama"], Llama3Scaling(8.0, 1.0, 4.0, 32))
    assert config.rope_theta == 500.0


def test_overrides():
    config = PolicyConfig.from_hf(HF, compute_dtype="bfloat16", remat=False)
    assert (config.compute_dtype, config.remat, config.rope_theta) == ("bfloat16", False, 10_000.0)
    assert PolicyConfig.from_hf(config.to_hf(), compute_dtype="bfloat16", remat=False) == config
    with pytest.raises(UserError, match="unknown override lr"):
        PolicyConfig.from_hf(HF, lr=1)
    with pytest.raises(UserError, match="compute_dtype must be one of"):
        PolicyConfig.from_hf(HF, compute_dtype="float16")


@pytest.mark.parametrize(
    "change",
    [
        {"attn_logit_softcapping": None, "num_experts": 0, "auto_map": {}, "use_mrope": False},
        {"residual_multiplier": 1.0, "embedding_multiplier": 1, "logits_scaling": None},
        {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 2},
        {"use_qk_norm": True, "temperature": 0.6, "unsloth_fixed": True, "id2label": {"0": "no"}},
    ],
)
def test_keys_that_change_nothing_may_stand(change):
    assert PolicyConfig.from_hf(HF | change) == PolicyConfig.from_hf(HF)


def test_a_window_that_nothing_switches_off_is_refused():
    with pytest.raises(UserError, match="sliding_window is 4096"):
        PolicyConfig.from_hf(LLAMA | {"sliding_window": 4096})


def without(hf, *keys):
    return {key: value for key, value in hf.items() if key not in keys}


def test_what_absent_keys_mean():
    config = PolicyConfig.from_hf(without(LLAMA, "head_dim", "num_key_value_heads", "tie_word_embeddings"))
    assert (config.head_dim, config.num_kv_heads, config.tie_embeddings) == (48 // 6, 6, False)
    assert PolicyConfig.from_hf(without(LLAMA, "head_dim") | {"head_dim": None}).head_dim == 8
    with pytest.raises(UserError, match="missing hidden_size, head_dim"):
        PolicyConfig.from_hf(without(HF, "hidden_size", "head_dim"))
    with pytest.raises(UserError, match=r"head_dim is missing, and hidden_size \(50\) is no multiple"):
        PolicyConfig.from_hf(without(LLAMA, "head_dim") | {"hidden_size": 50})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["MixtralForCausalLM"]},
            r"architectures is \['MixtralForCausalLM'\]; supported is one of Qwen3ForCausalLM, ",
        ),
        ({"architectures": None}, "architectures is None"),
        ({"architectures": "Qwen3ForCausalLM"}, "architectures is 'Qwen3ForCausalLM'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"layer_types": 3}, "layer_types is 3"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is {'quant_method': 'fp8'}"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_scaling.rope_type is 'dynamic'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "type yarn lacks original_max_position_embeddings"),
        ({"rope_scaling": YARN | {"truncate": False}}, "rope_scaling.truncate is False, which is not"),
        ({"rope_scaling": YARN | {"mscale": 1.0}}, "rope_scaling.mscale is 1.0, which is not"),
        ({"rope_scaling": YARN | {"low_freq_factor": 2.0}}, "rope_scaling.low_freq_factor is 2.0, which is not"),
        ({"rope_scaling": YARN | {"beta_fast": 0.5}}, r"beta_fast \(0.5\) must exceed beta_slow \(1.0\)"),
        (
            {"rope_scaling": YARN | {"beta_slow": 1e-320, "beta_fast": 1e-319}},
            "beta_slow must be from 0.001 to 16777216",
        ),
        (
            {"rope_scaling": YARN | {"original_max_position_embeddings": 1e300}},
            r"original_max_position_embeddings must be from 1 to 16777216, not 1e\+300",
        ),
        ({"rope_parameters": YARN | {"rope_theta": 1.0}}, "rope_theta must exceed 1 with yarn rope scaling, not 1.0"),
        ({"rope_scaling": YARN | {"attention_factor": 0}}, "attention_factor must be a positive number, not 0"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', not an object"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1.0}}, "rope_parameters.rope_type is 'longrope'"),
        (
            {"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor is 0.5",
        ),
        ({"rope_parameters": None}, "missing rope_theta"),
        ({"rope_theta": 7.0}, "rope_parameters, rope_theta and rope_scaling contradict each other"),
        ({"rope_scaling": SCALED}, "contradict"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "type llama3 lacks low_freq_factor, high_freq_factor, original_max",
        ),
        ({"rope_parameters": SCALED | {"rope_theta": 5.0, "factor": 0}}, "factor must be a positive number, not 0"),
        (
            {"rope_parameters": SCALED | {"rope_theta": 5.0, "low_freq_factor": 9}},
            r"high_freq \(4.0\) must exceed low_freq \(9\)",
        ),
        ({"num_attention_heads": 3}, r"num_heads \(3\) must be a multiple of num_kv_heads \(2\)"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"hidden_size": "32"}, r"d_model \(hidden_size\) must be a positive integer"),
        ({"hidden_size": 10**12}, r"d_model \(hidden_size\) must be a positive integer up to"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0, which may change what the model computes"),
        ({"final_logit_softcapping": 30}, "final_logit_softcapping is 30"),
        ({"residual_multiplier": 0.22}, "residual_multiplier is 0.22"),
        ({"residual_multiplier": 0}, "residual_multiplier is 0"),
        ({"logits_scaling": 8}, "logits_scaling is 8"),
        ({"attention_multiplier": 0.0078}, "attention_multiplier is 0.0078"),
        ({"num_experts": 64}, "num_experts is 64"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}, "auto_map is {"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type is 'alibi'"),
        ({"whatever_comes_next": [1]}, r"whatever_comes_next is \[1\]"),
        ({"use_qk_norm": False}, "use_qk_norm is False, unlike in Qwen3ForCausalLM"),
        ({"model_type": "mistral"}, "model_type is 'mistral', but the architecture Qwen3ForCausalLM is of 'qwen3'"),
        (
            {"rope_parameters": {"rope_theta": 1.0, "factor": 4.0}},
            "rope_parameters.factor is 4.0, which is not supported where the type is 'default'",
        ),
        ({"rope_parameters": {"rope_theta": 1.0, "mrope_section": [1, 2]}}, "rope_parameters.mrope_section is"),
        ({"rope_parameters": SCALED | {"rope_theta": 1.0, "type": "default"}}, "rope_type 'llama3', but the type"),
        ({"rms_norm_eps": 0}, "norm_eps must be a positive number"),
        ({"rms_norm_eps": float("nan")}, "norm_eps must be a positive number"),
    ],
)
def test_an_unsupported_config_is_refused_by_name(change, message):
    with pytest.raises(UserError, match=message) as error:
        PolicyConfig.from_hf(HF | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2: layers without experts among others are not supported"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]: layers without experts"),
        ({"num_experts": 6}, "num_experts and num_local_experts contradict each other"),
        ({"num_local_experts": None}, "missing num_experts"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size must be a positive integer up to"),
        ({"num_experts_per_tok": 6}, r"num_experts_per_tok \(6\) must not exceed num_experts \(5\)"),
        ({"norm_topk_prob": 1}, "norm_topk_prob must be true or false, not 1"),
        ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size is 64"),
        ({"n_group": 4}, "n_group is 4"),
    ],
)
def test_experts_that_the_decoder_does_not_compute_are_refused(change, message):
    with pytest.raises(UserError, match=message) as error:
        PolicyConfig.from_hf(MOE | change)
    assert "\n" not in str(error.value)


def test_experts_under_either_name_and_what_absent_keys_of_theirs_mean():
    config = PolicyConfig.from_hf(MOE)
    assert config.experts == ExpertsConfig(number=5, per_token=3, d_ff=28, renormalised=False)
    released = {key: value for key, value in MOE.items() if key != "num_local_experts"} | {"num_experts": 5}
    assert PolicyConfig.from_hf(released) == config
    absent = ("norm_topk_prob", "decoder_sparse_step", "mlp_only_layers", "router_aux_loss_coef")
    assert PolicyConfig.from_hf({key: value for key, value in MOE.items() if key not in absent}) == config
    with pytest.raises(UserError, match="which is impossible in qwen3_moe"):
        PolicyConfig.from_hf(MOE, experts=None)


def test_which_layers_of_smollm3_rotate():
    assert len(SMOLLM3["no_rope_layers"]) == 5
    absent = PolicyConfig.from_hf(without(SMOLLM3, "no_rope_layers", "no_rope_layer_interval", "tie_word_embeddings"))
    assert absent == PolicyConfig.from_hf(SMOLLM3) and absent.unrotated == (3,) and absent.tie_embeddings
    every_other = without(SMOLLM3, "no_rope_layers") | {"no_rope_layer_interval": 2}
    assert PolicyConfig.from_hf(every_other).unrotated == (1, 3)
    assert PolicyConfig.from_hf(SMOLLM3 | {"no_rope_layers": [0, 0, 0, 0, 0]}).unrotated == (0, 1, 2, 3, 4)
    assert PolicyConfig.from_hf(SMOLLM3 | {"no_rope_layers": [1, 1, 1, 1, 1]}).unrotated == ()
    with pytest.raises(UserError, match="layers without rotary positions are impossible in mistral"):
        PolicyConfig.from_hf(MISTRAL, unrotated=(1,))


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        (without(MISTRAL, "sliding_window"), "sliding_window is absent, which means a window in MistralForCausalLM"),
        (MISTRAL | {"sliding_window": 0}, "sliding_window must be a positive integer, not 0"),
        (
            MISTRAL | {"layer_types": ["sliding_attention"] * 3},
            "layer_types is .* only full_attention are supported here",
        ),
        (
            MISTRAL | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
            "layer_types are of two kinds, unlike in MistralForCausalLM",
        ),
        (MISTRAL | {"sliding_window": 8, "sliding_window_pattern": 2}, "pattern is 2, unlike in MistralForCausalLM"),
        (without(MISTRAL, "num_key_value_heads"), "missing num_key_value_heads"),
        (without(SMOLLM3, "num_key_value_heads"), "missing num_key_value_heads"),
        (SMOLLM3 | {"no_rope_layers": [1, 0]}, r"a 0 or 1 for each of 5 layers, not \[1, 0\]"),
        (SMOLLM3 | {"no_rope_layers": [1, 0, 1, 1, 2]}, "a 0 or 1 for each of 5 layers"),
        (SMOLLM3 | {"no_rope_layers": "all"}, "not 'all'"),
        (
            without(SMOLLM3, "no_rope_layers") | {"no_rope_layer_interval": 0},
            "no_rope_layer_interval must be a positive",
        ),
        (LLAMA | {"no_rope_layers": [1, 0]}, r"no_rope_layers is \[1, 0\], which may change"),
    ],
)
def test_what_mistral_and_smollm3_cannot_leave_out(hf, message):
    with pytest.raises(UserError, match=message):
        PolicyConfig.from_hf(hf)


def test_which_layers_have_a_window():
    config = PolicyConfig.from_hf(MISTRAL | {"sliding_window": 4096})
    assert (config.window, config.windowed, config.window_rope_theta) == (4096, (0, 1, 2), None)
    assert PolicyConfig.from_hf(MISTRAL).windowed == ()
    with pytest.raises(UserError, match=r"layers \(0,\) have a window, which is impossible in mistral"):
        PolicyConfig.from_hf(MISTRAL | {"sliding_window": 4096}, windowed=(0,))
    config = PolicyConfig.from_hf(OLMO3)
    assert (config.window, config.windowed) == (3, (0, 1, 2))
    assert PolicyConfig.from_hf(without(OLMO3, "layer_types")) == config  # every fourth has none
    older = without(OLMO3, "rope_parameters") | {"rope_theta": 500.0, "rope_scaling": YARN}
    assert PolicyConfig.from_hf(older) == config and config.rope_scaling == YarnScaling(4.0, 32)
    full, windowed = (OLMO3["rope_parameters"][f"{kind}_attention"] for kind in ("full", "sliding"))
    apart = PolicyConfig.from_hf(
        OLMO3 | {"rope_parameters": {"full_attention": full, "sliding_attention": windowed | {"rope_theta": 9.0}}}
    )
    assert (apart.rope_theta, apart.window_rope_theta) == (500.0, 9.0)
    assert PolicyConfig.from_hf(apart.to_hf()) == apart  # the older form has one base for both
    config = PolicyConfig.from_hf(GEMMA3)
    assert (config.window, config.windowed) == (5, (0, 1, 3)) and config.tie_embeddings
    assert (config.rope_theta, config.window_rope_theta, config.scores_dim) == (1e6, 100.0, 12)
    every_other = PolicyConfig.from_hf(GEMMA3 | {"sliding_window_pattern": 2, "_sliding_window_pattern": 2})
    assert every_other.windowed == (0, 2)
    every_sixth = PolicyConfig.from_hf(without(GEMMA3, "sliding_window_pattern", "_sliding_window_pattern"))
    assert every_sixth.windowed == (0, 1, 2, 3)
    scaled = PolicyConfig.from_hf(GEMMA3 | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}})
    assert scaled.rope_scaling == LinearScaling(8.0)
    assert PolicyConfig.from_hf(without(GEMMA3, "tie_word_embeddings", "cache_implementation")) == config


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        (without(GEMMA3, "sliding_window"), "sliding_window is absent, which means a window in Gemma3ForCausalLM"),
        (without(GEMMA3, "query_pre_attn_scalar"), "query_pre_attn_scalar.* is None, which is impossible in gemma3"),
        (
            without(GEMMA3, "rope_local_base_freq"),
            r"missing rope_local_base_freq \(or rope_parameters.sliding_attention",
        ),
        (without(GEMMA3, "head_dim"), "missing head_dim"),
        (GEMMA3 | {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be a positive number, not 0"),
        (GEMMA3 | {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'; only 'gelu_pytorch_tanh'"),
        (GEMMA3 | {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        (GEMMA3 | {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        (GEMMA3 | {"_sliding_window_pattern": 2}, r"sliding_window_pattern must be one positive integer, not \[3, 2\]"),
        (GEMMA3 | {"architectures": ["Gemma3ForConditionalGeneration"]}, "supported is one of"),
        (OLMO3 | {"layer_types": ["full_attention"]}, "layer_types must name each of 4 layers, not 1"),
        (OLMO3 | {"layer_types": ["chunked_attention"] * 4}, "only full_attention and sliding_attention are supported"),
        (
            OLMO3 | {"rope_parameters": OLMO3["rope_parameters"] | {"sliding_attention": YARN | {"rope_theta": 5.0}}},
            "rope_parameters.sliding_attention is scaled, which is not supported",
        ),
        (OLMO3 | {"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters has 'rope_theta' beside full_attention"),
        (OLMO3 | {"rope_theta": 7.0}, "contradict each other"),
        (HF | {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar is 64, which may change"),
        (HF | {"rope_local_base_freq": 5.0}, "rope_local_base_freq is 5.0, which may change"),
    ],
)
def test_what_gemma3_and_olmo3_cannot_leave_out(hf, message):
    with pytest.raises(UserError, match=message):
        PolicyConfig.from_hf(hf)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None)
@given(base=st.sampled_from([HF, LLAMA, MOE, OLMO3, GEMMA3]), data=st.data())
def test_whatever_stands_in_a_config_it_is_read_or_refused_in_one_line(base, data):
    keys = st.sampled_from(sorted({*base, "rope_scaling", "rope_parameters", "quantization_config", "layer_types"}))
    hf = base | data.draw(st.dictionaries(keys, _JSON, min_size=1, max_size=2))
    if data.draw(st.booleans()):
        inside = data.draw(
            st.dictionaries(
                st.sampled_from([*SCALED, *YARN, "beta_fast", "beta_slow", "rope_theta", "type"]), _JSON, max_size=3
            )
        )
        scaled = data.draw(st.sampled_from([SCALED, YARN, {"rope_type": "linear", "factor": 2.0}]))
        hf[data.draw(st.sampled_from(["rope_scaling", "rope_parameters"]))] = scaled | inside
    for key in data.draw(st.lists(keys, max_size=1)):
        hf.pop(key, None)
    try:
        config = PolicyConfig.from_hf(hf)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 400
    else:
        assert PolicyConfig.from_hf(config.to_hf()) == config
        if config.head_dim < 1000:
            rope.rotations(jnp.zeros((1, 1), int), config)  # whatever is read can be computed
