"""Graphs with labelled nodes as memory-mapped arrays: citation graphs, digits, or a file of the user's own."""

import contextlib
import gzip
import io
import json
import math
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy_format
from safetensors import safe_open
from sklearn.datasets import load_digits

from framp_core.config import DataConfig, GraphConfig
from framp_core.data.cache import cached, content_digest, file_stamps, names_digest
from framp_core.data.graph.checks import MASKS, UNLABELLED, RawGraph, checked, split_of, tidied
from framp_core.data.graph.neighbours import starts_of
from framp_core.data.graph.planetoid import PARTS, read_planetoid
from framp_core.errors import DataError, RunFolderError
from framp_core.extra import extra
from framp_core.files import read_json
from framp_core.foreign_text import listed
from framp_core.memory import require_memory

DIGITS_NEIGHBOURS = 10
"""Nearest neighbours that a digit is connected to in ``graph-digits``."""

_PLANETOID = {"cora": "Cora", "citeseer": "CiteSeer", "pubmed": "PubMed"}
_ARXIV_FILES = tuple(f"{name}.csv.gz" for name in ("edge", "num-node-list", "num-edge-list", "node-feat", "node-label"))
_ARXIV_NAMES = "labelidx2arxivcategeory.csv.gz"
_ARXIV_SPLIT = "split/time"
_ARXIV_URL = "http://snap.stanford.edu/ogb/data/nodeproppred/arxiv.zip"
_SAVED = ("x", "edge_index", "y")
_NAMES = "class_names"
_SPLIT = "split"
_LONGEST_HEADER = 2**17
"""Bytes of an array's header, ten times what NumPy reads."""


@dataclass(frozen=True, eq=False)
class GraphData:
    """A graph whose nodes have features and labels.

    Attributes:
        features: float32 ``(N, F)``, a read-only memory map.
        edges: int64 ``(2, E)``, source and target of each edge, sorted by (target, source), each edge once, none from
            a node to itself; an undirected graph has every edge in both directions.
        labels: int64 ``(N,)`` in [0, number of classes), -1 for a node without one; a class may have no nodes.
        class_names: name of each label.
        digests: SHA-256 of ``class names``, ``edges``, ``features`` and ``labels``; made once, with the cache.
        split: role of each node in the graph's own split, as ``RawGraph`` has it, int8 ``(N,)``; None for a random one.
        notes: what of a file is not used, or is used otherwise than may be expected, by what it is about.
    """

    features: np.ndarray
    edges: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    digests: Mapping[str, str]
    split: np.ndarray | None = None
    notes: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        """N, the number of nodes."""
        return len(self.labels)

    @property
    def shape(self) -> tuple[int]:
        """(features,) of a node."""
        return (self.features.shape[1],)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @cached_property
    def starts(self) -> np.ndarray:
        """The edges into node v are columns ``starts[v]`` up to ``starts[v + 1]`` of ``edges``; int64 ``(N + 1,)``."""
        return starts_of(self.edges[1], len(self))


def load_graph(data: DataConfig, graph: GraphConfig) -> GraphData:
    """Open a graph, decoding it into the cache on first use. Nothing is drawn at random, downloaded, or written
    below ``data.root``.

    - ``cora``, ``citeseer``, ``pubmed``: the Planetoid files in ``root/Cora/raw`` and so on, where PyG puts them,
      and as PyG reads them, features scaled to sum 1 per node as its ``NormalizeFeatures`` does. The 15 nodes of
      CiteSeer without features or label are of class 0, as in PyG. The files are pickles, of which nothing runs
      (:mod:`framp_core.data.graph.pickles`).
    - ``ogbn-arxiv``: the csv files in ``root/ogbn_arxiv/raw``, read by ogb's reader of raw files. Classes have the
      names of ``root/ogbn_arxiv/mapping`` if that is there.
    - ``graph-digits``: the 1797 digits of scikit-learn, pixels / 16 as features, with an edge to each digit from
      each of the 10 that are nearest to it in the ink of their 8 rows. Neighbours in all pixels would nearly always be
      the same digit (97 %, here 77 %), and a part of that graph a single class.
    - ``graph-file``: ``root`` is an .npz or .safetensors file with arrays ``x`` (N, F), ``edge_index`` (2, E) and
      ``y`` (N,) or (N, 1); an .npz may hold ``class_names`` too. Other arrays are not read, which ``notes`` say.

    With ``graph.split`` = ``file`` they have their own split: the masks of a ``graph-file``, the public split of
    Planetoid, that of ogbn-arxiv by years in ``root/ogbn_arxiv/split/time``.

    All of them: edges from a node to itself and repeated edges are dropped; ``graph.undirected`` adds the reverse of
    every edge; ``graph.largest_component`` keeps that component alone.

    Args:
        data: which graph, from where; ``name``, ``root`` and ``cache`` are used.
        graph: ``undirected``, ``largest_component`` and ``split`` are used.

    Raises:
        DataError: files are missing or damaged, :func:`~framp_core.data.graph.checks.checked` refuses them, or there is
            no split of the data set's own and it was asked for.
        ConfigError: a package of the extra ``graph`` is not installed.
    """
    own_split = graph.split == "file"
    identity, read = _source(data, own_split)
    options = {"undirected": graph.undirected, "largest_component": graph.largest_component}

    def build(folder: Path) -> None:
        ready = tidied(checked(read(), repr(data.root or data.name)), **options)
        if ready.split is not None:
            np.save(folder / f"{_SPLIT}.npy", ready.split)
        for name, array in (("features", ready.x), ("edges", ready.edge_index), ("labels", ready.y)):
            np.save(folder / f"{name}.npy", np.ascontiguousarray(array))
        facts = {"class_names": ready.class_names, "digests": digests_of(ready), "unread": ready.unread}
        (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")

    identity |= {"split": "file"} if own_split else {}
    return _open(cached(data.cache, {"name": data.name, **identity, **options}, build), own_split)


def digests_of(graph: RawGraph) -> dict[str, str]:
    """Of a graph that is checked and tidied, as :class:`GraphData` has them."""
    assert graph.class_names is not None
    arrays = {"edges": graph.edge_index, "features": graph.x, "labels": graph.y}
    return {"class names": names_digest(graph.class_names), **{part: content_digest(arrays[part]) for part in arrays}}


def _source(data: DataConfig, own_split: bool) -> tuple[dict[str, Any], Callable[[], RawGraph]]:
    """What the graph depends on besides its name and options, and how to read it."""
    if data.name == "graph-digits" and own_split:
        raise DataError("graph.split='file' and the digits have no split of their own; leave it at 'random'")
    if data.name == "graph-digits":
        return {"neighbours-in": "rows"}, _digits
    if not data.root:
        kind = "file" if data.name == "graph-file" else "folder of its files"
        raise DataError(f"data.root is empty; data set {data.name!r} needs the absolute {kind}")
    root = Path(data.root)
    if data.name == "graph-file":
        return {"root": str(root), "files": _stamps(root.parent, [root], _HOW_TO_SAVE)}, lambda: _file(root, own_split)
    return _planetoid(data.name, root) if data.name in _PLANETOID else _arxiv(root, own_split)


def _stamps(root: Path, files: list[Path], help_text: str) -> list[tuple[str, int, int, int]]:
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise DataError(f"{', '.join(map(repr, missing))} is missing in {str(files[0].parent)!r}: {help_text}")
    return file_stamps(root, files)


# --- graphs that come with a data set ---------------------------------------------------------------------------


def _digits() -> RawGraph:
    pixels, labels = load_digits(return_X_y=True)
    rows = pixels.reshape(-1, 8, 8).sum(axis=2)
    lengths = (rows**2).sum(axis=1)
    # Whole numbers, so exact: which of two equally near digits is chosen must not depend on the machine.
    distances = lengths[:, None] + lengths - 2 * rows @ rows.T
    np.fill_diagonal(distances, np.inf)
    nearest = np.argsort(distances, axis=1, kind="stable")[:, :DIGITS_NEIGHBOURS]
    targets = np.repeat(np.arange(len(pixels)), DIGITS_NEIGHBOURS)
    return RawGraph(pixels / 16, np.stack([nearest.ravel(), targets]), labels)


def _planetoid(name: str, root: Path) -> tuple[dict[str, Any], Callable[[], RawGraph]]:
    folder = root / _PLANETOID[name] / "raw"
    files = [folder / f"ind.{name}.{part}" for part in PARTS]
    help_text = (
        f"the Planetoid files of {name} must lie in {str(folder)!r}; data.root is {str(root)!r}. To download them: "
        f'python -c "from torch_geometric.datasets import Planetoid; Planetoid({str(root)!r}, {_PLANETOID[name]!r})"'
    )

    def read() -> RawGraph:
        try:
            return read_planetoid(folder, name)
        except (MemoryError, DataError):
            raise
        except Exception as error:  # Damaged pickles may raise almost anything.
            raise DataError(f"{name} is damaged ({error!r}): {help_text}") from error

    return {"root": str(root), "files": _stamps(root, files, help_text)}, read


def _arxiv(root: Path, own_split: bool) -> tuple[dict[str, Any], Callable[[], RawGraph]]:
    folder, names = root / "ogbn_arxiv" / "raw", root / "ogbn_arxiv" / "mapping" / _ARXIV_NAMES
    files = [folder / name for name in _ARXIV_FILES]
    parts = [root / "ogbn_arxiv" / _ARXIV_SPLIT / f"{part}.csv.gz" for part in ("train", "valid", "test")]
    help_text = (
        f"the raw files of ogbn-arxiv must lie in {str(folder)!r}; data.root is {str(root)!r}. Download {_ARXIV_URL}, "
        f"unpack it there, and rename the folder 'arxiv' to 'ogbn_arxiv'"
    )

    def read() -> RawGraph:
        reader, pandas = _ogb_reader(), extra("pandas")
        try:
            for file in read_files:
                _require_unpacked(file)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                (graph,) = reader.read_csv_graph_raw(str(folder))
            labels = pandas.read_csv(folder / "node-label.csv.gz", header=None).to_numpy()
            named = tuple(pandas.read_csv(names).iloc[:, 1].astype(str)) if names.is_file() else None
            split = _split_by_years(parts, len(labels)) if own_split else None
        except (MemoryError, DataError):
            raise
        except Exception as error:  # Damaged tables may raise almost anything.
            raise DataError(f"ogbn-arxiv is damaged ({error!r}): {help_text}") from error
        unread = () if graph["edge_feat"] is None else ("edge_feat",)
        return RawGraph(graph["node_feat"], graph["edge_index"], labels, named, split, unread)

    weights = folder / "edge-feat.csv.gz"  # Not part of ogbn-arxiv, but ogb's reader takes it if it is there.
    optional = [*([weights] if weights.exists() else []), *([names] if names.is_file() else [])]
    read_files = [*files, *optional, *(parts if own_split else [])]
    stamps = _stamps(root, [*files, *optional], help_text) + (_stamps(root, parts, help_text) if own_split else [])
    return {"root": str(root), "files": stamps}, read


def _split_by_years(parts: Sequence[Path], nodes: int) -> np.ndarray:
    masks = {}
    for name, file in zip(MASKS, parts, strict=True):
        masks[name] = np.zeros(nodes, dtype=bool)
        masks[name][extra("pandas").read_csv(file, header=None).to_numpy()[:, 0]] = True
    return split_of(masks, nodes, "ogbn-arxiv")


def _require_unpacked(file: Path) -> None:
    """A packed table whose text fits into memory, four times for the numbers that become of it."""
    total = 0
    with gzip.open(file) as stream:
        while chunk := stream.read(2**20):
            total += len(chunk)
            require_memory(4 * total, f"{str(file)!r} unpacks to {total / 1e9:.3g} GB or more")


def _ogb_reader() -> Any:
    """ogb's reader of raw files.

    On its first import ogb starts a thread that asks a server for ogb's newest version, unless the package ``outdated``
    cannot be imported; so it cannot, for that moment.
    """
    if "ogb" in sys.modules:
        return extra("ogb.io.read_graph_raw")
    with _hidden("outdated"):
        return extra("ogb.io.read_graph_raw")


@contextlib.contextmanager
def _hidden(module: str) -> Iterator[None]:
    modules: dict[str, Any] = sys.modules
    before = {name: loaded for name, loaded in modules.items() if name == module}
    modules[module] = None
    try:
        yield
    finally:
        del modules[module]
        modules.update(before)


# --- a file of the user's own -------------------------------------------------------------------------------------

_HOW_TO_SAVE = (
    "data.root of graph-file is an .npz or .safetensors file. To save a PyG graph `data` as one: "
    "np.savez('graph.npz', x=data.x, edge_index=data.edge_index, y=data.y)"
)


def _file(path: Path, own_split: bool) -> RawGraph:
    wanted = (*_SAVED, *(MASKS if own_split else ()))
    readers = {".npz": _npz, ".safetensors": _safetensors}
    if path.suffix not in readers:
        raise DataError(f"{str(path)!r} is neither .npz nor .safetensors: {_HOW_TO_SAVE}")
    try:
        held, arrays = readers[path.suffix](path, wanted)
    except (MemoryError, DataError):
        raise
    except Exception as error:  # Damaged archives may raise almost anything.
        raise DataError(f"{str(path)!r} cannot be read ({error}): {_HOW_TO_SAVE}") from error
    missing = [name for name in _SAVED if name not in arrays]
    if missing:
        raise DataError(
            f"{str(path)!r} holds {', '.join(map(repr, sorted(held))) or 'nothing'}, and not "
            f"{', '.join(map(repr, missing))}; expected arrays 'x', 'edge_index' and 'y': {_HOW_TO_SAVE}"
        )
    names = arrays.get(_NAMES)
    named = None if names is None else tuple(map(_name, names.ravel().tolist()))
    split = split_of(arrays, len(arrays["x"]), repr(str(path))) if own_split else None
    unread = tuple(name for name in held if name not in (*wanted, _NAMES))
    return RawGraph(arrays["x"], arrays["edge_index"], arrays["y"], named, split, unread)


def _name(given: object) -> str:
    return given.decode() if isinstance(given, bytes) else str(given)


def _npz(path: Path, names: Sequence[str]) -> tuple[list[str], dict[str, np.ndarray]]:
    if not zipfile.is_zipfile(path):
        raise ValueError("it is not what np.savez writes")
    with np.load(path, allow_pickle=False) as archive:
        wanted = [name for name in (*names, _NAMES) if name in archive.files]
        claimed = sum(_claimed(archive.zip, f"{name}.npy") for name in wanted)
        size, unpacked = (count / 1e9 for count in (path.stat().st_size, claimed))
        require_memory(3 * claimed, f"{str(path)!r} has {size:.3g} GB, and its arrays {unpacked:.3g} GB")
        return archive.files, {name: archive[name] for name in wanted}


def _claimed(archive: zipfile.ZipFile, entry: str) -> int:
    """Bytes of an array by its header, which must be those that the archive says the entry has."""
    with archive.open(entry) as packed:
        # NumPy would read a header of 4 GB before it finds it too long.
        file = io.BytesIO(packed.read(_LONGEST_HEADER))
    version = npy_format.read_magic(file)
    read = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
    shape, _, dtype = read(file)
    held, claimed = archive.getinfo(entry).file_size - file.tell(), math.prod(shape) * dtype.itemsize
    if held != claimed and not dtype.hasobject:  # Pickled objects have no size; np.load refuses them.
        raise ValueError(f"{entry} says that it is {dtype} of shape {shape} and has {held} bytes")
    return claimed


def _safetensors(path: Path, names: Sequence[str]) -> tuple[list[str], dict[str, np.ndarray]]:
    with safe_open(path, framework="pt") as archive:
        held = list(archive.keys())
        tensors = {name: archive.get_tensor(name) for name in names if name in held}
    # NumPy has no bfloat16.
    arrays = {name: (value.float() if value.is_floating_point() else value) for name, value in tensors.items()}
    return held, {name: value.numpy() for name, value in arrays.items()}


# --- shared -------------------------------------------------------------------------------------------------------


def _notes(unread: Sequence[str], labels: np.ndarray) -> dict[str, str]:
    """What to say of arrays that a file holds and nobody reads, and of nodes without a label."""
    masks = [name for name in unread if name in MASKS]
    weights = [name for name in unread if name.startswith("edge_")]
    others = [name for name in unread if name not in (*masks, *weights)]
    without = np.count_nonzero(labels == UNLABELLED)
    said = {
        "masks": f"{', '.join(masks)} not used: the split is random; graph.split=file takes theirs" if masks else "",
        "edge weights": f"{listed(weights)} not read: all edges count the same" if weights else "",
        "not read": listed(others) if others else "",
        "without a label": f"{without} of {len(labels)} nodes: they pass messages, untrained and untested"
        if without
        else "",
    }
    return {about: text for about, text in said.items() if text}


def _open(folder: Path, own_split: bool) -> GraphData:
    try:
        # A plain array over the map: indexing a np.memmap is several times slower.
        features, edges, labels = (
            np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in ("features", "edges", "labels")
        )
        facts = read_json(folder / "facts.json")
        split = np.load(folder / f"{_SPLIT}.npy") if own_split else None
        names, notes = tuple(facts["class_names"]), _notes(facts["unread"], labels)
        return GraphData(features, edges, labels, names, dict(facts["digests"]), split, notes)
    except (OSError, ValueError, KeyError, TypeError, RunFolderError) as error:
        raise DataError(f"the cached graph in {str(folder)!r} is damaged ({error}); delete that folder") from error
