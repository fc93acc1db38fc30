"""What `migrate` costs in time and memory, against bare CRIU and what people do by hand."""
