"""Metrics with intervals: of answers, captions, concepts and cost."""

from typing import TYPE_CHECKING

from xlvlms_tutorial._lazy import lazy_attributes

if TYPE_CHECKING:
    from xlvlms_tutorial.metrics.answers import (
        accuracy_by_type,
        answer_table,
        exact_match,
        normalise,
        yes_or_no,
    )
    from xlvlms_tutorial.metrics.captions import (
        CAPTION_FACTORS,
        SOUND_FACTORS,
        caption_attributes,
        names,
    )
    from xlvlms_tutorial.metrics.concept_factors import (
        adjusted_mutual_information,
        factor_information,
        frequent_words,
        varying_factors,
    )
    from xlvlms_tutorial.metrics.cost import count_flops, decoder_flops
    from xlvlms_tutorial.metrics.dictionaries import (
        ReconstructionError,
        Sparsity,
        match_concepts,
        reconstruction_error,
        sparsity,
        stability,
    )
    from xlvlms_tutorial.metrics.grounding import (
        bert_scores,
        clip_score,
        top_scores,
        word_overlap,
    )
    from xlvlms_tutorial.metrics.hallucination import chair, pope
    from xlvlms_tutorial.metrics.intervals import (
        Estimate,
        bootstrap,
        correlation,
        difference,
        percentile_interval,
        permutation_p,
        proportion,
        resampled_shares,
    )
    from xlvlms_tutorial.metrics.references import bleu, cider
    from xlvlms_tutorial.metrics.steering import answer_kl, steering_table
    from xlvlms_tutorial.metrics.timing import (
        compare_times,
        measure_time,
        memory_of,
        time_ratios,
    )
    from xlvlms_tutorial.metrics.vqa import vqa_accuracy
    from xlvlms_tutorial.text import STYLE_WORDS, forms, style_rate, style_share, vqa_normalise

__all__ = [
    "CAPTION_FACTORS",
    "SOUND_FACTORS",
    "STYLE_WORDS",
    "Estimate",
    "ReconstructionError",
    "Sparsity",
    "accuracy_by_type",
    "adjusted_mutual_information",
    "answer_kl",
    "answer_table",
    "bert_scores",
    "bleu",
    "bootstrap",
    "caption_attributes",
    "chair",
    "cider",
    "clip_score",
    "compare_times",
    "correlation",
    "count_flops",
    "decoder_flops",
    "difference",
    "exact_match",
    "factor_information",
    "forms",
    "frequent_words",
    "match_concepts",
    "measure_time",
    "memory_of",
    "names",
    "normalise",
    "percentile_interval",
    "permutation_p",
    "pope",
    "proportion",
    "reconstruction_error",
    "resampled_shares",
    "sparsity",
    "stability",
    "steering_table",
    "style_rate",
    "style_share",
    "time_ratios",
    "top_scores",
    "varying_factors",
    "vqa_accuracy",
    "vqa_normalise",
    "word_overlap",
    "yes_or_no",
]

__getattr__, __dir__ = lazy_attributes(__name__)
