def write_report(folder, summary, rows, identity): pass
