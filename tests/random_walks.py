"""Whole matrices that walk at random over a base, measured: panels of the metrics table without structure."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from wdanalysis.kernels.chance import chance, mean_squared_cosine
from wdanalysis.kernels.sums import vector_changes

LAYERS, SIZES = 8, np.array([0.1, 0.2, 0.35])
SHAPE = (40, 48)


def bases(generator: np.random.Generator) -> list[np.ndarray]:
    """One matrix a layer; layers differ in the lengths of their vectors and in how alike they are."""
    return [
        generator.uniform(0.5, 2)
        * generator.uniform(0.5, 1.5, size=(SHAPE[0], 1))
        * (generator.normal(size=SHAPE) + generator.uniform(0, 1) * generator.normal(size=SHAPE[1]))
        for _ in range(LAYERS)
    ]


def rows_of(W0: np.ndarray, layer: int, walk: Iterator[np.ndarray], rank: int | None) -> Iterator[dict]:
    """A layer's rows of the metrics table, a step for each place of the walk."""
    alignment = mean_squared_cosine(W0)
    for step, d in enumerate(walk):
        changes = vector_changes((W0**2).sum(1), np.einsum("ij,ij->i", W0, d), np.einsum("ij,ij->i", d, d))
        expected = chance(changes.magnitude, W0.shape[1], float((d**2).sum()), rank=rank, alignment=alignment)
        yield {
            **{"method": "M", "module": "q", "axis": "out", "name": f"q{layer}", "layer": layer},
            **{
                "step": step,
                "vectors": len(W0),
                "length": W0.shape[1],
                "update": "stored" if rank is None else "low-rank",
            },
            "delta_m": float(np.abs(changes.magnitude_change).mean()),
            "delta_d": float(changes.turn.mean()),
            "update_norm": float(np.linalg.norm(d)),
            "base_norm": float(np.linalg.norm(W0)),
            "rank": rank,
            **{f"null_{name}": value for name, value in vars(expected).items()},
        }


def walk(
    W0: np.ndarray, scale: float, rank: int | None, generator: np.random.Generator
) -> Iterator[np.ndarray]:
    """Random updates at every step, each the one before and a bit more; of a given norm."""
    vectors, length = W0.shape
    G, F = np.zeros((vectors, rank or length)), np.eye(length)
    if rank:
        F = generator.normal(size=(rank, length))
    for size, variance in zip(SIZES, np.diff(SIZES**2, prepend=0), strict=True):
        G = G + np.sqrt(variance) * generator.normal(size=G.shape)
        d = G @ F if rank else G
        yield d * (scale * size * np.linalg.norm(W0) / np.linalg.norm(d))


def panels(rank: int | None, draws: int) -> Iterator[pd.DataFrame]:
    generator = np.random.default_rng(0)
    layers, scales = bases(generator), generator.uniform(0.7, 1.4, size=LAYERS)
    for _ in range(draws):
        yield pd.DataFrame(
            [
                row
                for layer, (W0, scale) in enumerate(zip(layers, scales, strict=True))
                for row in rows_of(W0, layer, walk(W0, scale, rank, generator), rank)
            ]
        )


def dora_panel(generator: np.random.Generator, delta_d: np.ndarray, vectors: int = 40) -> pd.DataFrame:
    """Magnitudes that walk at random, the same in all layers, beside turns that are given (layers × steps)."""
    bits = np.sqrt(np.diff(SIZES**2, prepend=0))[:, None]
    m = np.cumsum(bits * generator.normal(size=(*delta_d.shape, vectors)), axis=1)
    layer, step = (index.ravel() for index in np.indices(delta_d.shape))
    return pd.DataFrame(
        {"method": "D", "module": "q", "axis": "out", "update": "dora", "name": layer, "layer": layer}
        | {"step": step, "vectors": vectors, "delta_d": delta_d.ravel(), "update_norm": 1.0}
        | {"delta_m": np.abs(m).mean(axis=2).ravel(), "delta_m_norm": np.linalg.norm(m, axis=2).ravel()}
    )
