"""Schemes: the strings and dicts that name them, and what is refused."""

import dataclasses
import inspect
import json

import jax
import pytest
from absl.testing import parameterized
from cases import SCHEMES as TRIED

from qjax import schemes
from qjax.errors import SchemeError
from qjax.formats import FORMATS
from qjax.scheme_json import scheme_from_dict, scheme_to_dict
from qjax.schemes import SCHEMES, Scheme, as_scheme, parse_scheme

# Text -> (canonical string, weight format, block, scale dtype, symmetric), as the documentation has them.
SPELLED = {
    "w4a16": ("w4a16:group_size=128", "int4", (1, 128), "float16", True),
    "w4a16:group_size=64,symmetric=false": (
        "w4a16:group_size=64,symmetric=false",
        "int4",
        (1, 64),
        "float16",
        False,
    ),
    "W4A16:group_size=channel": ("w4a16:group_size=-1", "int4", (1, None), "float32", True),
    "w8a16": ("w8a16", "int8", (1, None), "float32", True),
    "w8a16:group_size=tensor": (
        "w8a16:group_size=tensor",
        "int8",
        (None, None),
        "float32",
        True,
    ),
    "w8a16:group_size=128": ("w8a16:group_size=128", "int8", (1, 128), "float16", True),
    "w3a16": ("w3a16:group_size=128", "int3", (1, 128), "float16", False),
    "w3a16:symmetric=true": ("w3a16:group_size=128,symmetric=true", "int3", (1, 128), "float16", True),
    "w2a16": ("w2a16:group_size=64", "int2", (1, 64), "float16", False),
    "w6a16:scale_dtype=float32": (
        "w6a16:group_size=128,scale_dtype=float32",
        "int6",
        (1, 128),
        "float32",
        True,
    ),
    "fp8": ("fp8", "e4m3", (1, None), "float32", True),
    "fp8:granularity=tensor": ("fp8:granularity=tensor", "e4m3", (None, None), "float32", True),
    "fp8:format=e5m2,granularity=block": (
        "fp8:format=e5m2,granularity=block",
        "e5m2",
        (128, 128),
        "float32",
        True,
    ),
    "nf4": ("nf4", "nf4", (1, 64), "float32", True),
    "fp4:block_size=32": ("fp4:block_size=32", "fp4", (1, 32), "float32", True),
    "mxfp4": ("mxfp4", "e2m1", (1, 32), "float8_e8m0fnu", True),
    "mxfp8:format=e5m2": ("mxfp8:format=e5m2", "e5m2", (1, 32), "float8_e8m0fnu", True),
    "higgs": ("higgs:group_size=128", "higgs4", (1, 128), "float16", True),
    "higgs:p=2,bits=3": ("higgs:group_size=128,bits=3,p=2", "higgs3_p2", (1, 128), "float16", True),
    "nvfp4": ("nvfp4", "e2m1", (1, 16), "float8_e4m3fn", True),
}


class TextTest(parameterized.TestCase):
    @parameterized.parameters(*SPELLED)
    def test_a_string_names_a_scheme(self, text):
        scheme = parse_scheme(text)
        got = (str(scheme), scheme.weight, scheme.block, scheme.scale_dtype, scheme.symmetric)
        assert got == SPELLED[text]

    @parameterized.parameters(*SCHEMES, *TRIED)
    def test_a_scheme_and_its_string_are_each_other(self, text):
        scheme = parse_scheme(text)
        assert parse_scheme(str(scheme)) == scheme
        assert as_scheme(str(scheme)) == as_scheme(scheme) == scheme

    @parameterized.parameters(*SCHEMES)
    def test_every_constructor_is_public_and_documents_its_options(self, name):
        import qjax

        make = SCHEMES[name]
        assert getattr(qjax, make.__name__) is make
        assert make().weight in FORMATS
        assert inspect.signature(make).return_annotation is Scheme
        assert make.__doc__ and ("`" in make.__doc__)

    def test_a_constructor_spells_itself(self):
        assert str(schemes.W4A16(group_size=32)) == "w4a16:group_size=32"
        assert str(schemes.W8A8FP8(activation="block", granularity="block")) == (
            "w8a8_fp8:granularity=block,activation=block"
        )

    def test_equal_options_make_equal_schemes_however_they_are_written(self):
        assert schemes.W4A16() == schemes.W4A16(group_size=128)
        assert schemes.W8A16() == schemes.W8A16("channel") == parse_scheme("w8a16:group_size=-1")
        assert hash(schemes.NF4()) == hash(parse_scheme("nf4:block_size=64"))

    def test_a_static_scale_is_one_of_the_tensor(self):
        for make in (schemes.W8A8Int8, schemes.W4A8Int8, schemes.W8A8FP8):
            activation = make(mode="static").activation
            assert (activation.granularity, activation.mode) == ("tensor", "static")
            assert parse_scheme(str(make(mode="static"))) == make(mode="static")

    @parameterized.parameters(
        ("w8a8_int8", "int8", "token"), ("w4a8_int8:activation=tensor", "int8", "tensor"),
        ("w8a8_fp8", "e4m3", "token"), ("w8a8_fp8:activation=block", "e4m3", "block"),
        ("w8a8_fp8:format=e5m2", "e4m3", "token"),
    )  # fmt: skip
    def test_activations_follow_the_options(self, text, form, granularity):
        activation = parse_scheme(text).activation
        assert (activation.format, activation.granularity) == (form, granularity)
        assert activation.mode == "dynamic"

    @parameterized.parameters(
        ("int4", r"unknown scheme 'int4'; known: w8a16, .*nvfp4"),
        ("", r"unknown scheme ''"),
        ("w4a16:groups=32", r"w4a16: unknown option 'groups'; known: group_size, symmetric"),
        ("mxfp4:block_size=16", r"mxfp4: unknown option 'block_size'; known: none"),
        ("w4a16:group_size=32,group_size=64", r"w4a16: option group_size is given twice"),
        ("w4a16:group_size=", r"option group_size has no value"),
        ("w4a16:group_size", r"option group_size has no value"),
        ("w4a16:group_size=0", r"group_size=0; allowed: a positive integer, -1"),
        ("w4a16:group_size=-2", r"group_size=-2; allowed"),
        ("w4a16:group_size=--5", r"group_size='--5'; allowed"),
        ("w4a16:group_size=\u00b2", r"group_size=.*; allowed"),
        ("w4a16:group_size=1.5", r"group_size=1.5; allowed"),
        ("w4a16:group_size=true", r"group_size=True; allowed"),
        ("w4a16:group_size=none", r"group_size=None; allowed"),
        ("w4a16:symmetric=maybe", r"symmetric='maybe'; allowed: True, False"),
        ("w4a16:scale_dtype=float64", r"scale_dtype='float64'; allowed: None, 'float16'"),
        ("fp8:format=e3m4", r"fp8: format='e3m4'; allowed: 'e4m3', 'e5m2'"),
        ("fp8:granularity=token", r"granularity='token'; allowed: 'tensor', 'channel', 'block'"),
        ("w8a8_int8:activation=block", r"w8a8_int8: activation='block'; allowed: 'token'"),
        ("w8a8_int8:outliers=-6.0", r"w8a8_int8: outliers=-6.0; allowed: a positive number"),
        ("w8a8_fp8:mode=late", r"w8a8_fp8: mode='late'; allowed: 'dynamic', 'static', 'delayed'"),
        ("nf4:block_size=-64", r"nf4: block_size=-64; allowed: a positive integer"),
        ("nf4:block_size=true", r"nf4: block_size=True; allowed"),
        ("nf4:double_quant=2", r"nf4: double_quant=2; allowed: True, False"),
        ("mxfp8:format=e2m1", r"mxfp8: format='e2m1'; allowed"),
    )
    def test_a_bad_string_is_refused_with_what_is_allowed(self, text, message):
        with pytest.raises(SchemeError, match=message):
            parse_scheme(text)

    def test_only_schemes_and_their_strings_are_taken(self):
        with pytest.raises(SchemeError, match="got 4$"):
            as_scheme(4)
        with pytest.raises(SchemeError, match="got <function W4A16 at .*>; call it"):
            as_scheme(schemes.W4A16)


class DictTest(parameterized.TestCase):
    @parameterized.parameters(*SCHEMES, *TRIED)
    def test_a_scheme_survives_json(self, text):
        scheme = parse_scheme(text)
        again = scheme_from_dict(json.loads(json.dumps(scheme_to_dict(scheme))))
        assert again == scheme and hash(again) == hash(scheme)

    @parameterized.parameters(
        ({},), ({"color": 1},), ({"weight": None},), ({"weight": "int9"},), ({"block": 3},),
        ({"block": [1, 2, 3]},), ({"block": "ab"},), ({"block": [0, "x"]},),
        ({"activation": {"form": "int8"}},), ({"activation": 3},), ({"scale_dtype": "int4"},),
        ({"activation": {"format": "int3"}},),
    )  # fmt: skip
    def test_a_foreign_dict_is_refused(self, change):
        fields = scheme_to_dict(schemes.W8A8Int8())
        with pytest.raises(SchemeError, match="not a stored scheme"):
            scheme_from_dict({**fields, **change} if change else {})


class StaticTest(parameterized.TestCase):
    def test_a_scheme_is_static_under_jit(self):
        traced = []

        def f(scheme, x):
            traced.append(scheme)
            return x * scheme.bits

        jitted = jax.jit(f, static_argnums=0)
        assert jitted(schemes.W4A16(), 2.0) == jitted(parse_scheme("w4a16"), 2.0) == 8.0
        assert len(traced) == 1

    def test_a_scheme_cannot_be_changed_in_place(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            schemes.NF4().weight = "fp4"
