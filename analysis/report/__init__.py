"""The report: figures, tables, HTML, the summary for the terminal, and the files written."""
