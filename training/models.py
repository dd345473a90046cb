"""Which model does a configuration name? One of each family, made in one place."""

from training.gpt2 import GPT2
from training.model_config import ModelConfig
from training.modern import Modern

Model = GPT2 | Modern


def build_model(config: ModelConfig) -> Model:
    """With torch's own initial weights: `init_weights` draws the model's."""
    return Modern(config) if config.family == "nanochat" else GPT2(config)
