"""Models to use quantized weights in: Llama and kin, from config.json to generated text."""

from .generate import generate as generate
from .kv_cache import KVCache as KVCache
from .llama import Llama as Llama
from .llama_config import LlamaConfig as LlamaConfig
from .llama_weights import LayerWeights as LayerWeights
from .llama_weights import dense_reader as dense_reader
from .llama_weights import load_llama as load_llama
from .merge import merge as merge
from .perplexity import Perplexity as Perplexity
from .perplexity import perplexity as perplexity
from .tokenizer import Tokenizer as Tokenizer
from .tokenizer import load_tokenizer as load_tokenizer
