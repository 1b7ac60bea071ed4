// ---- Shared with the launcher and the plan, which lay them out in the same way ------------------------------------------
//% for struct in structs
${struct.cpp}

//% endfor
