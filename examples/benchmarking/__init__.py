"""The experiments behind the README's and the cards' tables: what is run (grids), how (running), and what is made of it (pages)."""
