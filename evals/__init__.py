"""Evals: checkpoints and samples to numbers with intervals, and numbers to a report, a model card and the Hub.

Metrics are plain numpy functions (``ranking``); what they return is filed in ``results.json`` (``results``); a finished
run directory becomes ``report.html`` (``report``), ``README.md`` (``card``) and, if asked, a repository (``hub``).
Scores of single prompts are filed in ``scores.jsonl`` (``scores``), by which runs are compared (``compare``).
"""
