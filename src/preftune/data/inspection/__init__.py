"""Looking at pairs: numbers, proofs, rows token by token, as text and as a page.

numbers.py   counts and quantiles, vectorised over whole columns
truncation.py  what limits would cut or drop, without cutting
proving.py   proofs of rows, read again from their source
shown.py     a row as pieces of text with the tokens behind them
report.py    all of it as tables
terminal.py, page.py  the report for people
"""
