"""Client architectures that read a graph: GCN, GraphSAGE and GAT, with PyTorch Geometric's convolutions.

Nothing else imports this file but :func:`framp_core.models.build_model`, and only where one of them is asked for, so
that images need no PyTorch Geometric.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import GATConv, GCNConv, SAGEConv

from framp_core.config import ModelConfig
from framp_core.errors import ModelError
from framp_core.graph_batch import GraphBatch
from framp_core.layout import Coupling
from framp_core.models import Block, Norm, slim_groups

_READS: dict[str, Literal["convolution", "mean", "edges"]] = {"gcn": "convolution", "sage": "mean", "gat": "edges"}
LINEAR = ("lin", "lin_l", "lin_r")
"""What PyTorch Geometric calls the linear layers within these convolutions."""


class GraphLayer(Block):
    """``relu(norm(conv(dropout(x), edges)))`` at every node of a graph.

    ``A[t, s]`` is the number of edges from s to t (messages run from source to target), A' = A + I, and D the diagonal
    matrix of the row sums of A'; the edges hold no loops. With x ``(nodes, f)`` and the layer's parameters W ``(c, f)``
    and b ``(c,)``, conv is one of

    - ``gcn``: ``D^-1/2 A' D^-1/2 x W^T + b`` (Kipf and Welling 2017). Degrees are those of the graph at hand, so that
      with sampled neighbours they are degrees in the sample.
    - ``sage``: ``mean of x over the edges into a node W_l^T + b + x W_r^T`` (Hamilton et al. 2017, mean aggregator,
      without their division by the norm); the mean of no edges is 0.
    - ``gat``: ``softmax(E) x W_h^T + b_h`` for each head h, side by side, where the softmax is over the edges into a
      node t, with multiplicities A'[t, s], of ``E[t, s] = leaky_relu(<att_src_h, W_h x_s> + <att_dst_h, W_h x_t>)``,
      slope 0.2 (Velickovic et al. 2018, without their dropout of attention).

    The network is slimmed as images' are: c follows the channels that are left. The number of heads is
    :func:`framp_core.models.slim_groups`: as many channels per head as at full width, so that a prefix of whole heads
    computes what it does in the full network. A prefix that ends within a head, or a window that does not start with
    one, is cut anew into equal heads, which then join channels of neighbouring heads; this is also what GroupNorm's
    groups do.

    Args:
        conv: what the formula calls conv; maps x and what it reads of the edges to values ``(nodes, c)``.
        edges: the attribute of :class:`framp_core.graph_batch.GraphBatch` that conv reads besides x. Sparse matrices
            take a third of the time of edge lists on a CPU, and no memory per edge and channel.
        norm: maps ``(nodes, c)`` to the same shape.
        dropout: share of the inputs that training drops.

    Raises:
        ModelError: the norm has a single channel per group.
    """

    def __init__(
        self, conv: nn.Module, edges: Literal["convolution", "mean", "edges"], norm: nn.Module, dropout: float
    ) -> None:
        super().__init__()
        if isinstance(norm, nn.GroupNorm) and norm.num_groups == norm.num_channels:
            raise ModelError(
                f"a graph layer of {norm.num_channels} channels in {norm.num_groups} groups normalises each value by "
                f"itself, which leaves nothing of it; use wider model.widths, fewer model.groups, larger "
                f"capacity.sizes or model.normalisation='none'"
            )
        self.dropout = nn.Dropout(dropout)
        self.conv = conv
        self.edges = edges
        self.norm = norm

    def forward(self, batch: GraphBatch) -> GraphBatch:
        """Map values ``(nodes, f)`` to ``(nodes, c)`` on the same graph."""
        return batch.carrying(F.relu(self.norm(self.conv(self.dropout(batch.x), getattr(batch, self.edges)))))

    def couplings(self, name: str, inputs: str) -> dict[str, Coupling]:
        """See :meth:`framp_core.models.Block.couplings`; a layer writes one group, called as the layer."""
        weights = {
            f"{name}.conv.{child}": Coupling(name, inputs) for child, _ in self.conv.named_children() if child in LINEAR
        }
        # Bias and attention vectors are parameters of the convolution itself.
        return {**weights, f"{name}.conv": Coupling(name), f"{name}.norm": Coupling(name)}


class AtSeeds(nn.Module):
    """The end of ``features``: from all nodes to those that are asked about."""

    def forward(self, batch: GraphBatch) -> Tensor:
        """Pick ``(b, c)`` of ``(nodes, c)``."""
        return batch.at_seeds()


def graph_net(config: ModelConfig, features: int, widths: Sequence[int], norms: Sequence[Norm]) -> nn.Sequential:
    """One :class:`GraphLayer` per width, then :class:`AtSeeds`.

    Args:
        config: ``name``, ``dropout`` and ``heads`` apply, and ``widths`` for the heads of a slim network.
        features: of each node.
        widths: channels that are left of the first ones of ``config.widths``.
        norms: builds the normalisation of each layer.

    Raises:
        ModelError: a width of a GAT is not a multiple of the heads, or normalisation would leave nothing.
    """
    layers = [
        GraphLayer(_convolution(config, narrow, wide, full), _READS[config.name], norm(wide), config.dropout)
        for (narrow, wide), full, norm in zip(pairwise((features, *widths)), config.widths, norms, strict=False)
    ]
    return nn.Sequential(*layers, AtSeeds())


def _convolution(config: ModelConfig, narrow: int, wide: int, full: int) -> nn.Module:
    """The convolution from ``narrow`` to ``wide`` of at first ``full`` channels."""
    if config.name == "gat":
        return _attention(narrow, wide, full, config.heads)
    # The matrices hold the weights of the edges, so that both have but to sum.
    conv: nn.Module = (
        GCNConv(narrow, wide, normalize=False) if config.name == "gcn" else SAGEConv(narrow, wide, aggr="sum")
    )
    return conv


def _attention(narrow: int, wide: int, full: int, full_heads: int) -> nn.Module:
    if full % full_heads:
        raise ModelError(
            f"{full} channels cannot be cut into {full_heads} attention heads; "
            f"choose model.heads as a divisor of every width in model.widths"
        )
    heads = slim_groups(full, wide, full_heads)
    conv: nn.Module = GATConv(narrow, wide // heads, heads=heads)
    return conv
