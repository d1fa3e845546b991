"""Data: from files to batches of uint8 images and packed tokens. Knows no model."""

from vlpfast.data.batch import Batch
from vlpfast.data.config import DataConfig
from vlpfast.data.index import Index, TokenTable
from vlpfast.data.loader import choose_loader, make_loader, make_tokenizer, open_index
from vlpfast.data.masking import mask_text
from vlpfast.data.plan import StreamPlan
from vlpfast.data.tokenizer import Tokenizer

__all__ = [
    "Batch",
    "DataConfig",
    "Index",
    "StreamPlan",
    "TokenTable",
    "Tokenizer",
    "choose_loader",
    "make_loader",
    "make_tokenizer",
    "mask_text",
    "open_index",
]
