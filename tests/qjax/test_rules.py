"""Rules: what a pattern speaks of, what wins, and what is said of one that is wrong."""

import pytest
from absl.testing import parameterized

from qjax.errors import RuleError, SchemeError
from qjax.rules import Rule, RuleUse, as_rules, is_convolution, is_head, match, parse_rules
from qjax.schemes import NF4, W4A16, W8A16

W4, W8 = W4A16(), W8A16()


class MatchTest(parameterized.TestCase):
    @parameterized.parameters(
        ("layers/0/mlp/up", ".*/mlp/.*", True),
        ("layers/0/mlp/up", "mlp", False),
        ("layers/0/mlp/up", "layers.0.mlp.up", True),
        ("layers/0/mlp/up", "layers/[1-9]/.*", False),
        ("lm_head", ".*", False),
        ("decoder/LM_Head", ".*", False),
        ("lm_head", ".*head", True),
        ("head/proj", ".*", True),
        ("", ".*", True),
    )
    def test_a_pattern_matches_the_whole_path_and_everything_leaves_heads_out(self, path, pattern, expected):
        self.assertEqual(Rule(pattern, W4).matches(path), expected)

    def test_an_embedding_has_to_be_named(self):
        rules = as_rules({".*": W4})
        self.assertIsNone(match(rules, "embed", "embedding"))
        self.assertEqual(match(as_rules({"emb.*": W8}), "embed", "embedding").scheme, W8)

    def test_the_first_match_wins_and_none_leaves_alone(self):
        rules = as_rules([("layers/0/.*", None), (".*/up", W8), (".*", W4)])
        self.assertIsNone(match(rules, "layers/0/up").scheme)
        self.assertEqual(match(rules, "layers/1/up").scheme, W8)
        self.assertEqual(match(rules, "layers/1/down").scheme, W4)

    def test_a_head_is_known_by_the_last_part_of_its_path(self):
        self.assertTrue(is_head("model/classifier"))
        self.assertFalse(is_head("classifier/dense"))


class AsRulesTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("a scheme", W4, (Rule(".*", W4),)),
        ("its string", "nf4", (Rule(".*", NF4()),)),
        ("a rule", Rule("a", W4, axis=(1,)), (Rule("a", W4, axis=(1,)),)),
        ("a mapping", {"a": W4, "b": None, "c": "w8a16"}, (Rule("a", W4), Rule("b", None), Rule("c", W8))),
        ("pairs and rules", [("a", "w8a16"), Rule("b", "nf4")], (Rule("a", W8), Rule("b", NF4()))),
    )
    def test_rules_come_from(self, given, expected):
        self.assertEqual(as_rules(given), expected)

    @parameterized.parameters((None,), (4,), ([[]],), ([("a", W4, 3)],), ({},), ([],))
    def test_anything_else_is_refused(self, given):
        with self.assertRaises(RuleError):
            as_rules(given)

    def test_a_broken_pattern_is_named(self):
        with self.assertRaisesRegex(RuleError, r"rule 'layers/\(' is no regular expression"):
            as_rules({"layers/(": W4})

    def test_an_unknown_scheme_is_named(self):
        with self.assertRaisesRegex(SchemeError, "unknown scheme 'int4'"):
            as_rules({".*": "int4"})


class ParseTest(parameterized.TestCase):
    def test_lines_comments_and_none(self):
        text = "# projections\n\n.*/mlp/.*   w4a16:group_size=64  # finer\n.*/q_proj none\n.* W8A16\n"
        self.assertEqual(
            parse_rules(text, "rules.txt"),
            (Rule(".*/mlp/.*", W4A16(group_size=64)), Rule(".*/q_proj", None), Rule(".*", W8)),
        )

    @parameterized.parameters(
        ("a w4a16\nb\n", "rules.txt, line 2: 'b' is not `regex scheme`"),
        ("a w5", "rules.txt, line 1: unknown scheme 'w5'"),
        ("\n( w4a16", "rules.txt, line 2: rule '\\(' is no regular expression"),
        ("# nothing\n", "rules.txt holds no rule"),
    )
    def test_an_error_names_file_and_line(self, text, message):
        with self.assertRaisesRegex(RuleError, message):
            parse_rules(text, "rules.txt")


class RuleUseTest(parameterized.TestCase):
    def test_a_rule_that_matches_nothing_is_named_with_the_paths_there_are(self):
        use = RuleUse(as_rules([("dec.*", W4), (".*", W8)]))
        for path in ("enc/a", "enc/b"):
            use.match(path)
        message = r"rule 'dec\.\*' matches nothing: it has to match all of a path, and layers .* are 'enc/a', 'enc/b'"
        with self.assertRaisesRegex(RuleError, message):
            use.check()

    def test_a_rule_whose_layers_an_earlier_one_takes_is_told_so(self):
        use = RuleUse(as_rules([(".*", W4), ("enc/a", W8)]))
        use.match("enc/a")
        with self.assertRaisesRegex(RuleError, r"rule 'enc/a' matches nothing that is left: rule '\.\*' before it"):
            use.check()

    def test_everything_matches_nothing_where_there_are_heads_only(self):
        use = RuleUse(as_rules(W4))
        use.match("lm_head")
        with self.assertRaisesRegex(RuleError, "lm_head are heads or embeddings, which a rule has to name"):
            use.check()

    def test_a_layer_that_is_passed_over_is_named_with_the_reason(self):
        use = RuleUse(as_rules([("norm|a", W4)]))
        use.pass_over("norm")
        use.pass_over("a", "is quantized already")
        use.match("b")
        with self.assertRaisesRegex(
            RuleError, "'norm' is no layer that can be quantized, 'a' is quantized already; .*'b'"
        ):
            use.check()

    @parameterized.parameters("Conv_0", "a/ConvTranspose_1", "ConvLocal_0", "conv", "conv1", "stem_conv", "conv2d_1")
    def test_a_convolution_is_known_by_its_name(self, path):
        self.assertTrue(is_convolution(path))

    @parameterized.parameters("converter", "convolve", "conv/proj", "unconv", "mlp")
    def test_other_names_are_no_convolutions(self, path):
        self.assertFalse(is_convolution(path))

    def test_everything_is_no_rule_before_itself(self):
        use = RuleUse(as_rules(W4))
        use.match("embed", "embedding")
        use.match("lm_head")
        use.pass_over("up", "is quantized already")
        use.pass_over("norm")
        message = "matches nothing: 'up' is quantized already; embed, lm_head are heads or embeddings, [a-z ]+$"
        with self.assertRaisesRegex(RuleError, message):
            use.check()

    def test_none_may_be_said_of_layers_that_are_never_quantized(self):
        use = RuleUse(as_rules([("norm", None), ("a", W4)]))
        use.match("a")
        use.pass_over("norm")
        use.check()

    def test_a_scheme_may_not(self):
        use = RuleUse(as_rules([("norm", W4)]))
        use.pass_over("norm")
        with pytest.raises(RuleError, match="'norm' matches nothing"):
            use.check()
