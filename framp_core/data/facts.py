"""What a model has to be told of the data that it was trained on, to be used on other data of the same kind."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from framp_core.data.sources import ImageData
from framp_core.data.transforms import Normaliser

if TYPE_CHECKING:
    from framp_core.data.graph import GraphData


@dataclass(frozen=True)
class DataFacts:
    """Shape, classes and normalisation of a data set.

    Attributes:
        shape: of an example, (channels, height, width) of an image, (features,) of a node.
        class_names: name of each label.
        normaliser: from uint8 pixels to network inputs; None for graphs, whose features are read as they are.
    """

    shape: tuple[int, ...]
    class_names: tuple[str, ...]
    normaliser: Normaliser | None

    @classmethod
    def of(cls, data: "ImageData | GraphData") -> Self:
        """The facts of a data set."""
        normaliser = data.normaliser if isinstance(data, ImageData) else None
        return cls(tuple(data.shape), data.class_names, normaliser)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`.

        Raises:
            KeyError: an entry is missing.
        """
        mean, std = content.get("mean"), content.get("std")
        normaliser = Normaliser(tuple(mean), tuple(std)) if mean and std else None
        return cls(tuple(content["shape"]), tuple(content["class_names"]), normaliser)

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types; ``mean`` and ``std`` of the channels for images alone."""
        normaliser = self.normaliser
        moments = {} if normaliser is None else {"mean": list(normaliser.mean), "std": list(normaliser.std)}
        return {"shape": list(self.shape), "class_names": list(self.class_names), **moments}
