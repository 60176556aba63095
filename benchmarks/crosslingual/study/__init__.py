"""The study of docs/study.md: what is run (``plan``), one run (``runs``), all runs on several cores (``pool``), what
the predictions say (``outcomes``, ``bootstrap``), and its tables and figures (``report``, ``plots``).
"""
