"""Metrics with intervals: of answers, captions, concepts and cost."""

from typing import TYPE_CHECKING

from xlvlms_tutorial._lazy import lazy_attributes

if TYPE_CHECKING:
    from xlvlms_tutorial.metrics.answers import accuracy_by_type, answer_table, yes_or_no
    from xlvlms_tutorial.metrics.captions import CAPTION_FACTORS, caption_attributes, names
    from xlvlms_tutorial.metrics.concept_factors import (
        adjusted_mutual_information,
        factor_information,
        frequent_words,
        varying_factors,
    )
    from xlvlms_tutorial.metrics.cost import count_flops, decoder_flops
    from xlvlms_tutorial.metrics.dictionaries import (
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
        mean_interval,
        percentile_interval,
        permutation_p,
        proportion,
        subtract,
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
    from xlvlms_tutorial.text import STYLE_WORDS, forms, style_rate, style_share

__all__ = [
    "CAPTION_FACTORS",
    "STYLE_WORDS",
    "Estimate",
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
    "factor_information",
    "forms",
    "frequent_words",
    "match_concepts",
    "mean_interval",
    "measure_time",
    "memory_of",
    "names",
    "percentile_interval",
    "permutation_p",
    "pope",
    "proportion",
    "reconstruction_error",
    "sparsity",
    "stability",
    "steering_table",
    "style_rate",
    "style_share",
    "subtract",
    "time_ratios",
    "top_scores",
    "varying_factors",
    "vqa_accuracy",
    "word_overlap",
    "yes_or_no",
]

__getattr__, __dir__ = lazy_attributes(__name__)
