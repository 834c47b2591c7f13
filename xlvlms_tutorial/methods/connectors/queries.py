"""A connector with learned queries: many features in, few tokens out."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from xlvlms_tutorial.validation import require


class QueryConnector(nn.Module):
    """Let a few learned queries read all features of an encoder, and become the tokens.

    Features and queries run through a small transformer together; what leaves it at the queries is
    projected to the width of the language model. Use it where a language model should see few
    tokens, whatever the number of features: a step costs less, and the number of tokens no longer
    depends on the size of the picture. DePALM (arXiv 2403.13499) calls it QPMapper.

    Parameters
    ----------
    width : int
        The width of the features.
    width_out : int
        The width of the language model.
    n_queries : int, default 10
        How many tokens come out. 10 as in *Implicit Multimodal Alignment* (arXiv 2405.16700).
    hidden : int, default 256
        The width inside, a multiple of ``heads``.
    heads : int, default 8
        Attention heads in each block.
    n_blocks : int, default 5
        Blocks of the transformer, with an MLP of twice the width.

    Raises
    ------
    InputError
        If the width inside is no multiple of the number of heads.

    Examples
    --------
    >>> import torch
    >>> from xlvlms_tutorial.methods.connectors import QueryConnector
    >>> connector = QueryConnector(width=32, width_out=48, n_queries=4, hidden=16, n_blocks=2)
    >>> connector(torch.zeros(3, 197, 32)).shape
    torch.Size([3, 4, 48])
    """

    def __init__(
        self,
        width: int,
        width_out: int,
        n_queries: int = 10,
        hidden: int = 256,
        heads: int = 8,
        n_blocks: int = 5,
    ) -> None:
        super().__init__()
        problem = f"the width inside, {hidden}, cannot be divided among {heads} heads"
        require(hidden % heads == 0, problem, "give a multiple of the number of heads")
        self.down = nn.Linear(width, hidden)
        self.queries = nn.Parameter(torch.randn(n_queries, hidden))
        block = nn.TransformerEncoderLayer(
            hidden, heads, 2 * hidden, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, n_blocks, enable_nested_tensor=False)
        self.up = nn.Linear(hidden, width)
        self.out = nn.Linear(width, width_out)

    def forward(self, features: Float[Tensor, "n t w"]) -> Float[Tensor, "n q d"]:
        """Turn features into tokens.

        Parameters
        ----------
        features : tensor (n, t, w)
            All tokens of an encoder's layer.

        Returns
        -------
        tensor (n, q, d)
            A token for each query, in the width of the language model.
        """
        queries = self.queries.expand(len(features), -1, -1)
        states = self.blocks(torch.cat([self.down(features), queries], dim=1))
        return self.out(self.up(states[:, -len(self.queries) :]))
