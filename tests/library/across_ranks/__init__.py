"""Cases of test_across_ranks.py: CASES of each op."""
