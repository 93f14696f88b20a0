"""Languages of tokens whose entropy is known: what a generator can reach, and no generator beats.

Every token is drawn from a table, given the class and the tokens at two earlier positions. In a
`mesh` these are the left and the upper neighbour; in a `pyramid` the cell of the next coarser grid
that contains the token's centre, its parent, and the parent's parent, so that the tokens of a scale
are independent given the coarser ones, as a next-scale generator draws them. Where there is no such
position stands the border, a symbol more.

A row of the tables is proportional to a product of three, one for the class and one for each of the
two tokens, drawn from a symmetric Dirichlet distribution. With 8 symbols and a concentration of 1
this leaves 1.27 nats of the 2.08 of log 8, in a mesh as in a pyramid. Products, because a generator
in random order must also reason backwards, from a token to those before it: where every row was
drawn on its own, one neighbour told next to nothing, and such a generator learned next to nothing.

The entropy is computed, not sampled, in float64: of a mesh by a transfer matrix, whose state is the
last token of every column (8^6 = 262,144 states for 6 columns); of a pyramid by passing the
distribution of (parent, token) down the tree.

Beside the letters of `interfaces`: A classes, R tables, U the symbols and the border (V + 1).
"""

import functools
import hashlib
import operator
from collections.abc import Callable, Sequence

import numpy as np

from tokgen import interfaces
from tokgen.data import sources

SPLITS = ("train", "held_out")


class Language(sources.RandomAccess):
    """A source of tokens as `tokens.Source`, drawn from (seed, split, index) without files.

    The label of element i is i modulo the number of classes. The splits share the tables and
    nothing else.

    Args:
      layout: its alphabet and grids; one symbol per position.
      before_L2: the two earlier positions that a token depends on; L for the border.
      rule_L: which table serves each position.
      table_ARUUV: probabilities of a token, given the class and the tokens at the two positions.
      contexts: table_RUUV of one class -> [L, U, U], the joint distribution of those two tokens.
    """

    holds = "tokens"

    def __init__(
        self,
        layout: interfaces.TokenLayout,
        before_L2: np.ndarray,
        rule_L: np.ndarray,
        table_ARUUV: np.ndarray,
        contexts: Callable[[np.ndarray], np.ndarray],
        *,
        split: str = "train",
        seed: int = 0,
        count: int = 1_000_000,
    ):
        if split not in SPLITS:
            raise interfaces.UserError(f"split must be one of {', '.join(SPLITS)}; found {split!r}")
        if count < 1 or not 0 <= seed < 2**32:
            raise interfaces.UserError(
                f"a language needs count >= 1 and a seed in [0, 2**32); found count={count}, "
                f"seed={seed}"
            )
        self.layout: dict = layout.to_json()
        self.classes = tuple(f"class {label}" for label in range(len(table_ARUUV)))
        self.views = ("center",)
        self.split, self.seed, self.count = split, int(seed), int(count)
        self.length, self.symbols = layout.length, layout.absent
        self.before_L2, self.rule_L, self.table_ARUUV = before_L2, rule_L, table_ARUUV
        self._contexts = contexts
        what = (self.layout, before_L2.tolist(), rule_L.tolist(), split, self.seed, self.count)
        digest = hashlib.sha256(repr(what).encode() + table_ARUUV.tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        """Many records at the price of few: `{"tokens": int32 [1, L, 1], "label": int}`."""
        # An index beyond the end must raise, as iteration and grain expect of a sequence.
        indices = [range(self.count)[operator.index(index)] for index in indices]
        key = [self.seed, SPLITS.index(self.split)]
        uniform_NL = np.empty((len(indices), self.length))
        for row_L, index in zip(uniform_NL, indices, strict=True):
            # The index is the highest word of the counter: 2**192 numbers lie before the next one.
            counter = np.array([0, 0, 0, index], np.uint64)
            np.random.Generator(np.random.Philox(counter=counter, key=key)).random(out=row_L)
        label_N = np.array(indices, np.int64) % len(self.classes)
        tokens_NLG = self._drawn(uniform_NL, label_N)
        return [
            {"tokens": tokens_LG[None], "label": int(label)}
            for tokens_LG, label in zip(tokens_NLG, label_N, strict=True)
        ]

    def name(self, index: int) -> str:
        """Split and number."""
        return f"{self.split}/{index}"

    def sample(self, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int32 [N, L, 1], label int64 [N]); all at once, apart from the records above."""
        draws = np.random.default_rng(seed)
        label_N = draws.integers(len(self.classes), size=count)
        return self._drawn(draws.random((count, self.length)), label_N), label_N

    def nats(self, tokens_NLG: np.ndarray, label_N: np.ndarray) -> np.ndarray:
        """[N, L] of the tokens, given the class and the tokens before."""
        tokens_NL = tokens_NLG[..., 0]
        border_N1 = np.full((len(tokens_NL), 1), self.symbols)
        around_NL2 = np.concatenate([tokens_NL, border_N1], axis=1)[:, self.before_L2]
        where = np.asarray(label_N)[:, None], self.rule_L[None]
        row_NLV = self.table_ARUUV[(*where, around_NL2[..., 0], around_NL2[..., 1])]
        return -np.log(np.take_along_axis(row_NLV, tokens_NL[..., None], axis=-1)[..., 0])

    def entropy(self) -> float:
        """Nats per token given the class, exact: the mean over classes and positions."""
        logs_ARUUV = np.log(np.maximum(self.table_ARUUV, 1e-300))
        cost_ARUU = -(self.table_ARUUV * logs_ARUUV).sum(-1)
        pairs = zip(cost_ARUU, self.table_ARUUV, strict=True)
        costs = [(self._contexts(table) * cost[self.rule_L]).sum() for cost, table in pairs]
        return float(np.mean(costs) / self.length)

    def unigram(self) -> float:
        """Nats per token of the best model that knows only how often each token occurs."""
        shares = [
            np.einsum("Luw,Luwv->v", self._contexts(table_RUUV), table_RUUV[self.rule_L])
            for table_RUUV in self.table_ARUUV
        ]
        share_V = np.mean(shares, axis=0) / self.length
        return float(-(share_V * np.log(share_V)).sum())

    def _drawn(self, uniform_NL: np.ndarray, label_N: np.ndarray) -> np.ndarray:
        """int32 [N, L, 1] by inverting the distribution of each token, position after position."""
        below_ARUUV = np.cumsum(self.table_ARUUV, axis=-1)[..., :-1]
        tokens_NL = np.full((len(label_N), self.length + 1), self.symbols, np.int32)
        for position, (first, second) in enumerate(self.before_L2):
            context = tokens_NL[:, first], tokens_NL[:, second]
            below_NV = below_ARUUV[(label_N, self.rule_L[position], *context)]
            tokens_NL[:, position] = (uniform_NL[:, position, None] >= below_NV).sum(-1)
        return tokens_NL[:, :-1, None]


def mesh(
    grid: tuple[int, int] = (6, 6),
    symbols: int = 8,
    classes: int = 4,
    *,
    concentration: float = 1.0,
    language: int = 0,
    **source,
) -> Language:
    """A causal Markov mesh: each token given its left and its upper neighbour and the class.

    `language` is the seed of the tables; `source` are split, seed and count.
    """
    layout = interfaces.TokenLayout((symbols,), (grid,))
    L, (_, columns) = layout.length, layout.grids[0]
    row_L, column_L = np.divmod(np.arange(L), columns)
    left_L = np.where(column_L > 0, np.arange(L) - 1, L)
    upper_L = np.where(row_L > 0, np.arange(L) - columns, L)
    return Language(
        layout,
        np.stack([left_L, upper_L], axis=-1),
        np.zeros(L, np.int64),
        _tables(classes, 1, symbols, concentration, language),
        functools.partial(_mesh_contexts, layout.grids[0]),
        **source,
    )


def pyramid(
    sides: tuple[int, ...] = (1, 2, 4),
    symbols: int = 8,
    classes: int = 4,
    *,
    concentration: float = 1.0,
    language: int = 0,
    **source,
) -> Language:
    """Square grids, coarse to fine, with a table for each: a token given its parent and class.

    And given the parent's parent, which the other tokens of the grid see too. `language` and
    `source` are as those of `mesh`.
    """
    layout = interfaces.TokenLayout((symbols,), tuple((side, side) for side in sides))
    L, parents = layout.length, [np.full(layout.spans[0][1], layout.length)]
    for scale in range(1, len(sides)):
        fine, coarse = sides[scale], sides[scale - 1]
        # integers: a centre may lie on an edge, where rounding would choose the side
        along = (2 * np.arange(fine) + 1) * coarse // (2 * fine)
        cells_ll = along[:, None] * coarse + along[None, :]
        parents.append(layout.spans[scale - 1][0] + cells_ll.reshape(-1))
    parent_L = np.concatenate(parents)
    grand_L = np.append(parent_L, L)[parent_L]  # the border's parent is the border
    rule_L = np.repeat(np.arange(len(sides)), [size for _, size in layout.spans])
    return Language(
        layout,
        np.stack([grand_L, parent_L], axis=-1),
        rule_L,
        _tables(classes, len(sides), symbols, concentration, language),
        functools.partial(_pyramid_contexts, parent_L, rule_L),
        **source,
    )


def codes(symbols: int) -> np.ndarray:
    """[V, V] a codebook that keeps the symbols of a pyramid apart: an axis for each.

    A sum of resized grids of these rows is, channel by channel, a linear image of the grids of
    each symbol. Their length makes the mean square of a channel 1.
    """
    return np.sqrt(symbols, dtype=np.float32) * np.eye(symbols, dtype=np.float32)


def _tables(classes: int, rules: int, symbols: int, concentration: float, seed: int) -> np.ndarray:
    """[A, R, U, U, V] products of a row of the class and of each of the two tokens."""
    if classes < 1 or not concentration > 0:
        raise interfaces.UserError(
            "a language needs at least one class and a concentration above 0; found "
            f"classes={classes}, concentration={concentration}"
        )
    draws, U = np.random.default_rng(seed), symbols + 1
    of_class, of_first, of_second = (
        draws.dirichlet([concentration] * symbols, size=(rules, size)) for size in (classes, U, U)
    )
    product_RAUUV = (
        of_class[:, :, None, None] * of_first[:, None, :, None] * of_second[:, None, None]
    )
    table_RAUUV = product_RAUUV / product_RAUUV.sum(-1, keepdims=True)
    return table_RAUUV.swapaxes(0, 1)


def _mesh_contexts(grid: tuple[int, int], table_RUUV: np.ndarray) -> np.ndarray:
    """[L, U, U] joint distribution of the left and the upper neighbour of every cell."""
    (rows, columns), (table_UUV,) = grid, table_RUUV
    V = table_UUV.shape[-1]
    within, border = slice(V), slice(V, V + 1)
    joint_LUU = np.zeros((rows * columns, V + 1, V + 1))
    state = np.ones(1)  # of the last token of every column; above the first row all are the border
    for cell in range(rows * columns):
        row, column = divmod(cell, columns)
        left, upper = within if column else border, within if row else border
        after = V ** (columns - column - 1) if row else 1
        # columns before the left one; left; upper; columns after the upper one
        state_bluc = state.reshape(-1, V if column else 1, V if row else 1, after)
        joint_LUU[cell, left, upper] = state_bluc.sum((0, 3))
        state = np.einsum("bluc,luv->blvc", state_bluc, table_UUV[left, upper])
    return joint_LUU


def _pyramid_contexts(
    parent_L: np.ndarray, rule_L: np.ndarray, table_RUUV: np.ndarray
) -> np.ndarray:
    """[L, U, U] joint distribution of the parent's parent and the parent of every cell."""
    V, L = table_RUUV.shape[-1], len(parent_L)
    joint_LUU = np.zeros((L, V + 1, V + 1))
    for cell, parent in enumerate(parent_L):
        if parent == L:
            joint_LUU[cell, V, V] = 1
            continue
        # over the parent's grandparent: the pair moves down by one generation
        joint_LUU[cell, :, :V] = np.einsum(
            "gp,gpv->pv", joint_LUU[parent], table_RUUV[rule_L[parent]]
        )
    return joint_LUU
