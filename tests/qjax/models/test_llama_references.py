"""Small models of every family and rope scaling against what `transformers` computed for them."""

import json
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import nnx

from qjax.checkpoints import CheckpointFiles, write_folder
from qjax.models import Llama, load_llama
from qjax.models.llama_config import LlamaConfig

DATA = Path(__file__).parents[2] / "data"
CASES = json.loads((DATA / "llama_references.json").read_text())["cases"]
ARRAYS = np.load(DATA / "llama_references.npz")

forward = nnx.jit(lambda model, ids: model(ids))
forward_cached = nnx.jit(lambda model, ids, cache: model(ids, cache))


def write_reference(folder: Path, case: str, config: dict | None = None) -> CheckpointFiles:
    """The folder of a reference model; each tensor is drawn from its name."""
    tensors = {
        name: (np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape) * 0.4).astype(np.float32)
        for name, shape in CASES[case]["tensors"].items()
    }
    write_folder(folder, tensors=tensors, config=config or CASES[case]["config"])
    return CheckpointFiles.open(folder)


def shown(logits: jnp.ndarray) -> np.ndarray:
    """The positions whose logits were kept: first, middle, last."""
    length = logits.shape[1]
    return np.asarray(logits)[:, [0, length // 2, length - 1]]


class ReferenceTest(parameterized.TestCase):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "model"

    def load(self, case: str, config: dict | None = None) -> Llama:
        return load_llama(write_reference(self.folder, case, config), dtype=jnp.float32)

    @parameterized.parameters(*CASES)
    def test_logits_are_those_of_transformers(self, case):
        model = self.load(case)
        for length in (12, 40):
            logits = forward(model, ARRAYS[f"{case}/ids{length}"])
            np.testing.assert_allclose(shown(logits), ARRAYS[f"{case}/logits{length}"], atol=1e-4, rtol=0)

    @parameterized.parameters("gemma3", "gemma3_types")
    def test_an_older_gemma_states_the_base_of_its_local_layers_apart(self, case):
        config = dict(CASES[case]["config"])
        turns = config.pop("rope_parameters")
        config["rope_theta"] = turns["full_attention"]["rope_theta"]
        config["rope_local_base_freq"] = turns["sliding_attention"]["rope_theta"]
        if case == "gemma3":
            del config["layer_types"]  # every sixth layer sees all
        logits = forward(self.load(case, config), ARRAYS[f"{case}/ids40"])
        np.testing.assert_allclose(shown(logits), ARRAYS[f"{case}/logits40"], atol=1e-4, rtol=0)

    @parameterized.product(case=("gemma3", "llama"), root=("language_model.model.", "model.language_model."))
    def test_the_text_part_of_a_model_that_sees_is_read_alone(self, case, root):
        files = write_reference(self.folder, case)
        tensors = {root + name.removeprefix("model."): np.array(files[name]) for name in files}
        tensors |= {"vision_tower.patch.weight": np.ones((2, 2)), "multi_modal_projector.norm.weight": np.ones(2)}
        head = "language_model.lm_head." if root.endswith(".model.") else "lm_head."
        tensors = {name.replace(f"{root}lm_head.", head): array for name, array in tensors.items()}
        config = {"model_type": "gemma3", "text_config": files.config, "vision_config": {"hidden_size": 2}}
        write_folder(self.folder, tensors=tensors, config=config, overwrite=True)
        model = load_llama(CheckpointFiles.open(self.folder), dtype=jnp.float32)
        logits = forward(model, ARRAYS[f"{case}/ids40"])
        np.testing.assert_allclose(shown(logits), ARRAYS[f"{case}/logits40"], atol=1e-4, rtol=0)
        assert model.notes == ("2 tensors of multi_modal_projector.norm and others: text alone is read",)

    def test_what_the_config_of_a_gemma_that_sees_leaves_out_is_as_in_transformers(self):
        text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
        text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
        config = LlamaConfig.from_hf({"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 106]})
        shape = (config.vocab_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        assert shape == (262208, 8, 4, 256) and config.eos_token_ids == (1, 106) and config.tie_word_embeddings
        assert config.sliding_windows[4:7] == (1024, None, 1024) and config.rope.factor == 8

    @parameterized.parameters("llama_llama3", "llama_yarn_mscale", "llama_dynamic")
    def test_an_older_config_states_the_same_scaling_in_rope_scaling(self, case):
        config = dict(CASES[case]["config"])
        scaling = dict(config.pop("rope_parameters"))
        config["rope_theta"] = scaling.pop("rope_theta")
        config["rope_scaling"] = {"type": scaling.pop("rope_type"), **scaling}
        logits = forward(self.load(case, config), ARRAYS[f"{case}/ids40"])
        np.testing.assert_allclose(shown(logits), ARRAYS[f"{case}/logits40"], atol=1e-4, rtol=0)

    @parameterized.parameters("llama", "mistral", "qwen2_window", "qwen3", "llama_yarn")
    def test_prefill_and_decode_give_the_logits_of_one_pass(self, case):
        model = self.load(case)
        ids = jnp.asarray(ARRAYS[f"{case}/ids40"])
        whole = forward(model, ids)
        logits, cache = forward_cached(model, ids[:, :21], model.empty_cache(2, 40))
        parts = [logits]
        for t in range(21, 40):
            logits, cache = forward_cached(model, ids[:, t : t + 1], cache)
            parts.append(logits)
        np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-4, rtol=0)
        np.testing.assert_array_equal(cache.lengths, [40, 40])

    @parameterized.parameters("llama_dynamic", "llama_longrope")
    def test_a_short_row_turns_by_its_own_length_beside_a_long_one(self, case):
        model = self.load(case)
        ids = np.zeros((2, 40), np.int32)
        ids[0, :12], ids[1] = ARRAYS[f"{case}/ids12"][0], ARRAYS[f"{case}/ids40"][1]
        positions = np.stack([np.where(np.arange(40) < 12, np.arange(40), -1), np.arange(40)])
        logits = np.asarray(model(jnp.asarray(ids), positions=jnp.asarray(positions)))
        short, long = ARRAYS[f"{case}/logits12"][0], ARRAYS[f"{case}/logits40"][1]
        np.testing.assert_allclose(logits[0, [0, 6, 11]], short, atol=1e-4, rtol=0)
        np.testing.assert_allclose(logits[1, [0, 20, 39]], long, atol=1e-4, rtol=0)

    def test_a_sliding_window_changes_what_late_tokens_see(self):
        late = [ARRAYS[f"{case}/logits40"][:, 2] for case in ("mistral", "mistral_no_window")]
        self.assertGreater(np.abs(late[0] - late[1]).max(), 0.1)


if __name__ == "__main__":
    absltest.main()
