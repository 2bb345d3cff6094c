"""Tests of ``evals``: numbers against vectors, pages in a browser, pushes against a server on this machine."""
