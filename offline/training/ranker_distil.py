"""Smaller rankers that learn from a larger one: a student to serve in its place, the light scorer of the cascade.

Shapes and targets for offline/training/ranker_fit.py; the towers' counterpart is offline/training/distil.py, and both
count the teacher's opinion by `offline.teacher_share`. Source: Hinton et al., "Distilling the Knowledge in a Neural
Network", 2015. Invariant: a teacher's opinion changes targets only, never what is held out.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ranker.model import RankerBatch, RankerConfig, RankerModel, Tables

# Need not be quick: it does not serve.
TEACHER_SHAPE = partial(RankerConfig, attention_width=64, cross_layers=3, cross_rank=64, hidden=(256, 128))
# Reads the history by its similarities alone.
STUDENT_SHAPE = partial(RankerConfig, attention_width=0, cross_layers=0, item_width=0, category_width=0, hidden=(64,))
LIGHT_SHAPE = partial(STUDENT_SHAPE, hidden=(16,), user_width=8, reads_history=False)
# Times as many epochs as the teacher's: a step costs less, and opinions are not as soon learnt by heart as labels are.
MORE_EPOCHS = 2


@dataclass(frozen=True)
class Teacher:
    """A trained ranker and how much its opinion counts, against what really was chosen."""

    model: RankerModel
    share: float

    def logits(self, batch: RankerBatch, table: Tables) -> Tensor:
        """What it thinks of each candidate, [B, C, heads]."""
        with torch.inference_mode():
            made: Tensor = self.model.eval()(batch, table)
        # A tensor of inference mode could not be part of a loss.
        return made.clone()

    def start(self, student: RankerModel) -> None:
        """Gives a student the parts that both have in one shape to begin with; its own say begins as nothing."""
        own = student.state_dict()
        same = {name: value for name, value in self.model.state_dict().items() if name in own}
        student.load_state_dict(own | {name: value for name, value in same.items() if value.shape == own[name].shape})
        student.begin_as_retrieved()

    def mixed(self, targets: Tensor, opinion: Tensor) -> Tensor:
        """Targets and the teacher's probabilities by their shares, shape of both."""
        return torch.lerp(targets, opinion, self.share)


def without_tastes(model: RankerModel) -> RankerModel:
    """The same without its copy of the items' tastes: beside another ranker it reads that one's table."""
    bare = RankerModel(replace(model.config, items=0)).eval()
    bare.load_state_dict({**model.state_dict(), "tastes": bare.tastes})
    return bare
