"""Graphs whose nodes are classified, their partition over clients, and what one client sees of them.

Reading PyG's and ogb's files and cutting graphs needs the optional extra: ``pip install 'framp[graph]'``.
"""

from framp_core.data.graph.inspect import graph_facts
from framp_core.data.graph.nodes import LabelledNodes, Subgraph, client_data, load_graph_partition
from framp_core.data.graph.partition import make_graph_partition
from framp_core.data.graph.sources import GraphData, load_graph

__all__ = [
    "GraphData",
    "LabelledNodes",
    "Subgraph",
    "client_data",
    "graph_facts",
    "load_graph",
    "load_graph_partition",
    "make_graph_partition",
]
