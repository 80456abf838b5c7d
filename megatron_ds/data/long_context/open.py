"""Mixes of lengths: the documents of each band as a dataset of their own, blended by shares (Fu et al. 2024).

Long documents are rare, so that a run which reads documents as they come learns little about long ranges. Fu et al.,
"Data Engineering for Scaling Language Models to 128K Context", read long documents more often within each source, and
keep the sources' own proportions: here, `data.long_context` with a weight for each source.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron_ds.data.blend import Blend, ConcatDataset, OrderedDataset
from megatron_ds.data.dataset import Dataset
from megatron_ds.data.held_out import HeldOut
from megatron_ds.data.long_context.bands import ANY_LENGTH, LengthBand, bands_of
from megatron_ds.data.long_context.dataset import BandDataset
from megatron_ds.data.long_context.documents import Documents
from megatron_ds.data.request import DatasetRequest

OpenDocuments = Callable[[DatasetRequest], Documents]


@dataclass(frozen=True)
class LongContext:
    """Samples from documents of given lengths.

    Attributes:
        shares: (least length of a document in tokens, share of the samples) of each band, in any order.
        packing: whether documents in a sample do not attend to one another.
    """

    shares: tuple[tuple[int, float], ...]
    packing: bool = False

    def open(self, request: DatasetRequest, open_documents: OpenDocuments, held_out: HeldOut | None = None) -> Dataset:
        """Open the documents of a request's sources: blended by shares for training, each sample once for validation.

        Args:
            request: its sources are one corpus; its order is that of the run, None = for validation.
            open_documents: opens the documents of a request, such as `DataFormat.open_documents`.
            held_out: the part of each band that is read; None = all, and for validation without bands.

        Raises:
            DataError: the documents cannot be opened, or those of a band do not fill one sample.
        """
        if held_out is not None and held_out.by_source and request.order is None and len(request.inputs) > 1:
            each = [replace(request, inputs=(source,)) for source in request.inputs]
            parts = [self.open(one, open_documents, held_out) for one in each]
            return ConcatDataset(parts, [str(source) for source in request.inputs])
        documents = open_documents(request)
        if request.order is None and held_out is None:
            return self._band(request, documents, ANY_LENGTH)
        bands = bands_of(dict(self.shares))
        names = [str(band) for band in bands]
        datasets: list[Dataset] = [self._band(request, documents, band) for band in bands]
        if held_out is not None:
            datasets = [held_out.part_of(one, f"{documents.name}, {name}") for one, name in zip(datasets, names)]
        order = request.order
        if order is None:
            return ConcatDataset(datasets, names)
        ordered = [OrderedDataset(one, order, number) for number, one in enumerate(datasets)]
        return Blend(ordered, names, list(bands.values()), order.num_samples, request.cache_dir)

    def _band(self, request: DatasetRequest, documents: Documents, band: LengthBand) -> BandDataset:
        return BandDataset(documents, band, request.seq_length, self.packing, request.cache_dir)
