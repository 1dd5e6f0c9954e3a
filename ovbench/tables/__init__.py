"""What people read of records: tables of runs and of papers, plots, the HTML report."""
