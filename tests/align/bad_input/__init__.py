"""The table of what users get wrong, which ``tests/align/test_bad_input.py`` runs."""
