"""Experiments on real students and real rationales: does the method work, and what do its approximations cost?"""
