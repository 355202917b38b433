saescope.receive(43,{"pairs":{},"matched":{},"texts":{}});
