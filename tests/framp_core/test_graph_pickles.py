"""Pickles that others wrote: the arrays in them are read, and nothing in them runs."""

import collections
import contextlib
import os
import pickle
import re
import subprocess
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import framp_core
from framp_core import memory
from framp_core.data.graph.pickles import dense, read_pickle
from framp_core.errors import DataError

PROTOCOLS = [0, 1, 2, 3, 4]


@settings(max_examples=60)
@given(
    st.sampled_from(PROTOCOLS),
    npst.arrays(
        st.sampled_from(["<i4", "<i8", ">f8", "<f4", "|u1", "|b1", "<f2", ">u2"]),
        npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    ),
    st.booleans(),
)
def test_arrays_are_what_numpy_pickled(protocol, array, by_columns):
    array = np.asfortranarray(array) if by_columns else array
    read = dense(read_pickle(pickle.dumps(array, protocol)))
    np.testing.assert_array_equal(read, array)
    assert (read.dtype, read.shape) == (array.dtype, array.shape)


@settings(max_examples=40)
@given(
    st.sampled_from(PROTOCOLS),
    npst.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 5)), elements=st.sampled_from([0, 0, 1, 2.5])),
    st.sampled_from([scipy.sparse.csr_matrix, scipy.sparse.csr_array]),
)
def test_sparse_matrices_are_what_scipy_pickled(protocol, array, kind):
    read = dense(read_pickle(pickle.dumps(kind(array), protocol)))
    np.testing.assert_array_equal(read, array)
    assert read.dtype == array.dtype


def test_names_of_python_2_and_old_libraries_are_read():
    """Byte for byte what Python 2, NumPy 1 and SciPy 0.1x wrote for an int32 matrix and a default dictionary."""
    numbers = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR(K\x01K\x02\x85"
    kind = b"cnumpy\ndtype\nU\x02i4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"

    def array(*values):
        raw = np.array(values, "<i4").tobytes()
        return numbers.replace(b"K\x02\x85", b"K%c\x85" % len(values)) + kind + b"U%c" % len(raw) + raw + b"tb"

    state = b"}(U\x06_shapeK\x02K\x03\x86U\x06indptr%sU\x07indices%sU\x04data%su"
    content = state % (array(0, 1, 2), array(2, 0), array(5, 255))
    for head in (
        b"cscipy.sparse.csr\ncsr_matrix\n)\x81",
        b"ccopy_reg\n_reconstructor\n(cscipy.sparse.csr\ncsr_matrix\nc__builtin__\nobject\nNtR",
    ):
        np.testing.assert_array_equal(
            dense(read_pickle(b"\x80\x02" + head + content + b"b.")), [[0, 0, 5], [255, 0, 0]]
        )
    graph = collections.defaultdict(list, {0: [1, 2], 1: [0]})
    python2 = pickle.dumps(graph, 2).replace(b"cbuiltins\n", b"c__builtin__\n")
    assert b"__builtin__" in python2
    assert read_pickle(python2) == {0: [1, 2], 1: [0]}


class Calls:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def chained(*names):
    """A pickle that walks from module to attribute by getattr."""
    found = b"cnumpy\n" + names[0] + b"\n"
    for name in names[1:]:
        found = b"cbuiltins\ngetattr\n(" + found + b"V" + name + b"\ntR"
    return found + b"."


HOSTILE = {
    "os.system": lambda mark: pickle.dumps(Calls(os.system, f"touch {mark}"), 2),
    "subprocess": lambda mark: pickle.dumps(Calls(subprocess.Popen, ["touch", mark]), 4),
    "eval": lambda mark: pickle.dumps(Calls(eval, f"open({mark!r}, 'w')"), 0),
    "exec in a list": lambda mark: pickle.dumps([1, {2: Calls(exec, f"open({mark!r}, 'w')")}], 4),
    "python 2's builtins": lambda mark: b"c__builtin__\neval\n(V" + f"open({mark!r}, 'w')".encode() + b"\ntR.",
    "numpy.load": lambda mark: pickle.dumps(Calls(np.load, mark, None, True), 2),
    "numpy.save": lambda mark: pickle.dumps(Calls(np.save, mark, 1), 2),
    "numpy.memmap": lambda mark: b"cnumpy\nmemmap\n(V" + mark.encode() + b"\nVu1\nVw+\nI0\n(I9\nttR.",
    "numpy.f2py": lambda mark: b"cnumpy.f2py\ncompile\n(Vx\ntR.",
    "numpy's test runner": lambda mark: (
        b"cnumpy.testing._private.utils\nrunstring\n(Vopen('" + mark.encode() + b"','w')\n}tR."
    ),
    "a chain of getattr": lambda mark: chained(b"ndarray", b"__init__", b"__globals__"),
    "a dotted name": lambda mark: b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.",
    "a parent's class": lambda mark: b"\x80\x04\x8c\x08builtins\x8c\x0cobject.__new\x93.",
    "scipy's pickled function": lambda mark: b"cscipy._lib._bunch\n_make_tuple_bunch\n(Vos\n(Vx\nttR.",
    "scipy's sparse loader": lambda mark: b"cscipy.sparse\nload_npz\n(V" + mark.encode() + b"\ntR.",
    "an extension code": lambda mark: b"\x82\x01.",
    "a persistent id": lambda mark: b"Pos\n.",
    "old instances": lambda mark: b"(ios\nsystem\n.",
    "a class instead of a list": lambda mark: b"(Vtouch\nc__builtin__\ncompile\no.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_pickle_wants_to_call_is_refused_and_does_not_run(name, tmp_path):
    mark = tmp_path / "mark"
    content = HOSTILE[name](str(mark))
    with pytest.raises(Exception, match=r"it asks for|unregistered extension|persistent_load|persistent id"):
        read_pickle(content)
    assert list(tmp_path.iterdir()) == []


def test_the_hostile_pickles_are_hostile(tmp_path):
    for name in ("os.system", "eval", "exec in a list", "python 2's builtins"):
        mark = tmp_path / name.replace(" ", "-").replace("'", "")
        pickle.loads(HOSTILE[name](str(mark)))
        assert mark.exists(), name


@pytest.mark.parametrize(
    "build",
    [
        b"cnumpy\ndtype\n}Vargs\nVx\nsb.",
        b"cnumpy\ndtype\nN}V__new__\nVx\ns\x86b.",
        b"ccollections\ndefaultdict\nN}V__init__\nVx\ns\x86b.",
    ],
)
def test_a_stand_in_is_not_changed_for_the_next_file(build):
    with pytest.raises((TypeError, pickle.UnpicklingError)):
        read_pickle(build)
    np.testing.assert_array_equal(dense(read_pickle(pickle.dumps(np.eye(2)))), np.eye(2))


# --- arrays that are not what they say ----------------------------------------------------------------------------


def stated(shape=(2,), dtype=("i4", 0, 1), order="<", raw=b"12345678", by_columns=False):
    """A pickled array whose state says this, as bytes."""
    array = Calls(np.array, 0)
    array.call = (np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"))

    class Stated:
        def __reduce__(self):
            kind = Kind()
            return np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), (1, shape, kind, by_columns, raw)

    class Kind:
        def __reduce__(self):
            return np.dtype, dtype, (3, order, None, None, None, -1, -1, 0)

    return pickle.dumps(Stated(), 4)


@pytest.mark.parametrize(
    "given_",
    [
        {"shape": (10**12,)},
        {"shape": (10**6, 10**6, 10**6)},
        {"shape": (-2,)},
        {"shape": (2.0,)},
        {"shape": [2]},
        {"shape": (1,) * 9 + (2,)},
        {"dtype": ("O8", 0, 1), "shape": (1,)},
        {"dtype": ("V8", 0, 1), "shape": (1,)},
        {"dtype": ("i4,i4", 0, 1), "shape": (1,)},
        {"dtype": ("S99999999999", 0, 1)},
        {"order": "O"},
        {"raw": "\u20ac2345678"},
        {"raw": 8},
        {"raw": None},
    ],
)
def test_an_array_that_is_not_what_it_says_is_refused(given_):
    np.testing.assert_array_equal(dense(read_pickle(stated())), np.frombuffer(b"12345678", "<i4"))
    with pytest.raises(ValueError, match=r"array|shape|encode"):
        dense(read_pickle(stated(**given_)))


def rows(**changed):
    matrix = scipy.sparse.csr_matrix(np.eye(3, dtype=np.float32))
    for name, value in changed.items():
        matrix.__dict__[name] = value
    return pickle.dumps(matrix, 2)


@pytest.mark.parametrize(
    "changed",
    [
        {"indices": np.array([0, 1, 99], np.int32)},
        {"indices": np.array([0, -7, 2], np.int32)},
        {"indptr": np.array([0, 1, 99, 3], np.int32)},
        {"indptr": np.array([0, 5, 1, 3], np.int32)},
        {"indptr": np.array([0, 3], np.int32)},
        {"data": np.ones(1, np.float32)},
        {"_shape": (3,)},
        {"_shape": (-3, 3)},
    ],
)
def test_a_matrix_that_points_outside_is_refused(changed):
    with pytest.raises(ValueError, match=r"."):
        dense(read_pickle(rows(**changed)))


@pytest.mark.parametrize("found", [1, "text", None, {}, [1], b"cnumpy\nndarray\n.", b"cnumpy\nndarray\n)R."])
def test_what_is_no_array_is_refused(found):
    with pytest.raises(ValueError, match="expected an array"):
        dense(read_pickle(found) if isinstance(found, bytes) else found)


def test_a_matrix_larger_than_the_memory_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 10**9)
    with pytest.raises(DataError, match=r"3 x 100000000000 numbers; reading it takes .* 1 GB are free"):
        dense(read_pickle(rows(_shape=(3, 10**11))))


BOMBS = {
    "a far place in the memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "a byte array": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"x.",
    "bytes": b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"x.",
    "text": b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b"x.",
    "a frame": b"\x80\x04\x95" + (2**40).to_bytes(8, "little") + b"N.",
    "copies of a list": b"(" + b"I1\n" * 20_000 + b"lp1\n0" + b"(" + b"cbuiltins\nlist\ng1\n\x85R" * 2_000 + b"l.",
    "copies of a dictionary": b"("
    + b"".join(b"I%d\nN" % i for i in range(9_000))
    + b"dp1\n0("
    + b"ccollections\ndefaultdict\nNg1\n\x86R" * 2_000
    + b"l.",
    "encoded copies of a text": b"V" + b"x" * 10**5 + b"\np1\n0(" + b"c_codecs\nencode\ng1\n\x85R" * 5_000 + b"l.",
    "brackets": b"]" * 200_000 + b"a" * 199_999 + b".",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_pickle_takes_little_memory(name):
    tracemalloc.start()
    with contextlib.suppress(EOFError, KeyError, ValueError, pickle.UnpicklingError):
        read_pickle(BOMBS[name])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**25 + 100 * len(BOMBS[name]), peak


def test_no_other_place_of_the_project_opens_a_pickle():
    root = Path(framp_core.__file__).parents[1]
    loaders = re.compile(
        r"\b(pickle|cloudpickle|dill|joblib|marshal|shelve)\b(?=\.|$)|torch\.load|allow_pickle=(?!False)"
    )
    files = [
        file
        for package in ("framp", "framp_core", "server_app", "client_app")
        for file in (root / package).rglob("*.py")
    ]
    assert len(files) > 100
    assert [file.name for file in files if loaders.search(file.read_text(), re.MULTILINE)] == ["pickles.py"]
