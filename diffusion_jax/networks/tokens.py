"""Any network over images or sequences as one over tokens: embedded before it, logits after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from diffusion_jax.networks.validation import check_positive


class TokenNetwork(nnx.Module):
    """Tokens of any number of axes as an image whose channels are the embeddings.

    A text of L tokens is a sequence of L places with `token_dim` channels, of which a DiT with
    patch 1 is the usual bidirectional transformer; tokens in two dimensions are a picture, which a
    U-Net takes as well. The head of the inner network gives one logit a token of the vocabulary,
    and starts from zero: all tokens alike.

    Args:
        make: the inner network's class, which takes `out_channels`.
        shape: shape of an example, without channels: `(256,)` or `(8, 8)`.
        states: rows of the table: the vocabulary, and one more for the mask where there is one.
        vocabulary: logits a token.
        token_dim: channels of the embedding.
        rngs: of the parameters.
        **options: of the inner network.

    Raises:
        ConfigError: a size that cannot work, naming `network.token_dim` or the inner field.
    """

    def __init__(
        self,
        make: Callable[..., nnx.Module],
        shape: Sequence[int],
        *,
        states: int,
        vocabulary: int,
        token_dim: int = 64,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        check_positive("network", token_dim=token_dim)
        self.shape, self.states, self.vocabulary = tuple(shape), states, vocabulary
        # Unit variance a channel, as pixels have.
        normal = nnx.initializers.normal(1.0)
        self.table = nnx.Param(normal(rngs.params(), (states, token_dim), jnp.float32))
        self.inner: Any = make((*shape, token_dim), out_channels=vocabulary, rngs=rngs, **options)
        self.noise_input: str = self.inner.noise_input

    def post_update(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """What the inner network asks for after each update, of its own parameters."""
        update = getattr(self.inner, "post_update", None)
        return {**params, "inner": update(params["inner"])} if update else dict(params)

    def __call__(
        self,
        x: Int[Array, "b *space"],
        noise: Float[Array, " b"],
        conditioning: Mapping[str, Array],
        *,
        key: Key[Array, "*k"] | None = None,
        **options: Any,
    ) -> Any:
        """Logits [b, *space, vocabulary], float32; `options` and what they add are the inner
        network's. A token out of range gives NaN, never another token's logits.

        Raises:
            ValueError: examples of another shape than the network was built for.
        """
        if x.shape[1:] != self.shape:
            raise ValueError(f"x has tokens of shape {x.shape[1:]}; the network takes {self.shape}")
        embedded = (
            self.table[...].at[x].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        )
        return self.inner(embedded, noise, conditioning, key=key, **options)
