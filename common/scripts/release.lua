#!lua flags=allow-oom
-- A worker gives jobs back (drain, out of memory): to the head of their queue, without counting an attempt.
-- ARGV  1 worker  2 most claims, 0: the claim is not counted, since the worker could not begin  then id  epoch
-- Reply: number of jobs given back. A repeat finds other epochs and changes nothing.
--@include base
--@include jobs

-- As if the claim had not been. One that was the job's first has begun nothing: its tenant is not charged for it.
local function uncount(j)
  call('HSET', P .. 'j:' .. j.id, 'nc', int(j.nc - 1))
  if j.nc == 1 and j.pe == 0 then
    call('HSET', P .. 'j:' .. j.id, 'sc', 0, 'ch', 0)
    charge(j.t, -j.ch / j.wt)
  end
end

local now, most, released = now_ms(), tonumber(ARGV[2]), 0
for at = 3, #ARGV, 2 do
  local j = load(ARGV[at])
  if j and j.st == 'R' and j.w == ARGV[1] and j.ep == tonumber(ARGV[at + 1]) then
    requeue(j, false, math.huge, most > 0 and most or math.huge, now)
    if most == 0 then uncount(j) end
    released = released + 1
  end
end
return released
