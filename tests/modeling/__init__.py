"""Tests of the modeling room."""
