"""A text, letter by letter: masked diffusion with a bidirectional transformer.

    python -m diffusion_jax.main --config=configs/text8.py --config.data.path=text8 \\
        --workdir=runs/text8

Any text file will do: letters are brought to lower case, digits spelled out, and all else becomes a
space (`--config.data.text.alphabet=bytes` takes the bytes as they are). 90% are for training, the
next 5% for validation. The network is that of the published runs (12 blocks of 768, windows of 256;
Austin et al. 2021, Lou et al. 2024, Sahoo et al. 2024), a size for accelerators.

The variant `:markov` needs no file: letters of a random chain of order one. `val/loss`, bits a
letter, cannot fall below their entropy, 2.4570 (`data.markov.entropy_bits` / 64).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from diffusion_jax import config as configs


def get_config(variant: str = "") -> ConfigDict:
    """The config; the variant `markov` is for a laptop, and `smoke` runs in seconds."""
    config = configs.base()
    config.data.name = "text"
    config.data.text.alphabet = "text8"
    config.data.text.length = 256
    config.process.name = "masked"
    config.objective.name = "continuous"
    config.objective.continuous.bound_steps = 256
    config.steps = 1_000_000
    config.batch_size = 512
    config.network.name = "dit"
    config.network.noise_input = "t"
    config.network.token_dim = 128
    config.network.dit.patch = 1
    config.network.dit.dim = 768
    config.network.dit.depth = 12
    config.network.dit.heads = 12
    config.network.dit.positions = "rope"
    config.network.dit.qk_norm = True
    config.network.dit.mlp = "swiglu"
    config.optimizer.learning_rate = 3e-4
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 2500
    config.optimizer.adamw.weight_decay = 0.03
    config.ema.decays.default = 0.9999
    config.checkpoint.every = 10_000
    config.validation.every = 10_000
    config.validation.examples = 1024
    config.sampling.every = 10_000
    config.sampling.solver = "ancestral"
    config.sampling.steps = 256
    config.sampling.num = 16
    config.sampling.batch_size = 16
    configs.apply_variant(config, variant, {"markov": _markov, "smoke": _smoke})
    return config


def _markov(config: ConfigDict) -> None:
    config.data.name = "markov"
    config.data.markov.length = 64
    config.steps = 2000
    config.batch_size = 64
    config.network.token_dim = 64
    config.network.dit.dim = 96
    config.network.dit.depth = 3
    config.network.dit.heads = 4
    config.objective.continuous.bound_steps = 64
    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 100
    config.ema.decays.default = 0.995
    config.checkpoint.every = 500
    config.validation.every = 500
    config.validation.examples = 256
    config.sampling.every = 500
    config.sampling.steps = 64


def _smoke(config: ConfigDict) -> None:
    _markov(config)
    config.data.markov.length = 16
    config.data.markov.size = 64
    config.data.markov.held_out = 16
    config.steps = 4
    config.batch_size = 16
    config.network.dit.dim = 32
    config.network.dit.depth = 1
    config.objective.continuous.bound_steps = 4
    config.optimizer.warmup_steps = 1
    config.logging.every = 2
    config.validation.examples = 16
    config.sampling.num = 8
    config.sampling.steps = 4
