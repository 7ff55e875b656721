"""Lightning callbacks: the plug-ins, the mechanism they share, and the attention monitor."""
