"""What tests of several ops share; no tests."""
