"""Fine-tuning and data curation for models that think.

- ``sft``: the FSDP2 trainer, ``python -m s1engine.training.sft``
- ``curate``: the funnel from many questions to 1,000, ``python -m s1engine.training.curate``
- ``examples``: the recipe of the bundled s1-nano, and the s1 paper in miniature

s1engine itself never imports this package.
"""
