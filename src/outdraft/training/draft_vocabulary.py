"""Which tokens a reduced draft vocabulary keeps: the most frequent ones of what is to be drafted.

Counts tokens; knows nothing of how a drafter uses them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from outdraft.data.tokenization import ExampleSet
from outdraft.methods.checkpoint import Network
from outdraft.methods.fspad.network import FeatureHead


def keep_frequent(drafter: Network, examples: ExampleSet) -> None:
    """Give a drafter with a reduced draft vocabulary its tokens; others stay as they are."""
    if isinstance(drafter, FeatureHead) and drafter.draft_tokens is not None:
        kept = most_frequent(examples, drafter.config.vocab_size, drafter.config.draft_vocab_size)
        drafter.draft_tokens.copy_(kept)


def most_frequent(examples: ExampleSet, vocab_size: int, count: int) -> Tensor:
    """`(count,)` ids in rising order: those that responses hold most often; between equals the ones that occur more
    often anywhere, then smaller ids."""
    ids = torch.cat([example.input_ids for example in examples.examples]).long()
    response = torch.cat([example.loss_mask for example in examples.examples]).bool()
    anywhere = torch.bincount(ids, minlength=vocab_size)
    responded = torch.bincount(ids[response], minlength=vocab_size)
    order = (responded * (len(ids) + 1) + anywhere).argsort(descending=True, stable=True)
    return order[:count].sort().values
