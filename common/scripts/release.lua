#!lua flags=allow-oom
-- A worker gives jobs back (drain, out of memory): to the head of their queue, without counting an attempt.
-- ARGV  1 worker  2 most claims, 0: the claim is not counted, since the worker could not begin  then id  epoch
-- Reply: number of jobs given back. A repeat finds other epochs and changes nothing.
--@include base
--@include jobs
local now, most, released = now_ms(), tonumber(ARGV[2]), 0
for at = 3, #ARGV, 2 do
  local j = load(ARGV[at])
  if j and j.st == 'R' and j.w == ARGV[1] and j.ep == tonumber(ARGV[at + 1]) then
    requeue(j, false, math.huge, most > 0 and most or math.huge, now)
    if most == 0 then call('HSET', P .. 'j:' .. j.id, 'nc', int(j.nc - 1)) end
    released = released + 1
  end
end
return released
