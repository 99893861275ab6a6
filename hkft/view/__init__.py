"""The terminal and the HTML report: the only room that knows rich or a template. Import its modules one by one."""
