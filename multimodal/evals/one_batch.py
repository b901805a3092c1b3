"""Whether a model has learnt the batch that it sees again and again: the first thing to try with new data."""

import logging
from collections.abc import Callable

from multimodal.evals.retrieval import Retrieval
from multimodal.parts import Encoder, Report, Sources

logger = logging.getLogger(__name__)


class OneBatch(Retrieval):
    """Retrieval among the pairs of training, which says in words whether all of them are found.

    What a model cannot learn by heart it will not learn: then captions do not belong to their images, or are all
    alike, or the rate of learning is far off. Whether it generalises, this does not ask.
    """

    def build(self, data: Sources) -> Callable[[Encoder], Report]:
        retrieve = super().build(data)

        def run(encoder: Encoder) -> Report:
            report = retrieve(encoder)
            found = {key: float(getattr(one, "value", one)) for key, one in report.metrics.items()}
            both = {"images": found["i2t_r1"], "captions": found["t2i_r1"]}
            told = ", ".join(f"{share:.1%} of {what}" for what, share in both.items())
            if min(both.values()) == 1:
                logger.info("one batch: learnt, all images and captions find each other")
            else:
                logger.warning("one batch: not learnt yet, %s find each other; it should come to 100%%", told)
            return report

        return run
